mod files;
mod machines;
mod settings;
