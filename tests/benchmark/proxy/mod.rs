//! nix-offload-proxy against what ssh itself offers for hosts behind a bastion.

mod inside;
mod jump;
mod scene;
mod server;
mod stampede;
mod start;
mod stream;

pub(crate) use inside::{Direction, Inside};
pub(crate) use jump::jump;
pub(crate) use scene::Scene;
pub(crate) use stampede::stampede;
pub(crate) use start::start;
pub(crate) use stream::{sessions, stream};
