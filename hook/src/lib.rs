//! The Nix build hook.
