//! Where a command for people stands: whose hook it is about, and what that hook has before it. Nix's settings, the
//! machines, the store, and the directories for what is kept.
//!
//! Must never connect to a machine, nor change anything.

use crate::cli::Meant;
use crate::config::{self, Fleet, Settings};
use crate::files::read_machines_file;
use crate::nix_here::{self, AskError, View};
use crate::reach::{DAEMON_SOCKET, Reach, ReachSetupError};
use crate::slots::Slots;
use crate::state;
use crate::store::{Location, LocationError};
use nix::unistd::{Uid, User, geteuid};
use nix_offload_proxy::exit;
use nix_offload_proxy::settings::{self as offload, SettingsError};
use serde::de::DeserializeOwned;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why there is nothing to stand on.
#[derive(Debug, Error)]
pub enum VantageError {
    /// Nix does not say what its settings are.
    #[error(transparent)]
    Nix(#[from] AskError),
    /// The store is of a kind whose builds go another way.
    #[error(transparent)]
    Location(#[from] LocationError),
    /// The hook runs as another user.
    #[error("builds of the Nix daemon are sent by its hook, which runs as {0}; you are {1}")]
    NotOurs(String, String),
    /// There is no place for what is to be kept.
    #[error("there is no state directory: neither HOME nor XDG_STATE_HOME nor NIX_OFFLOAD_STATE_DIR is set")]
    NoState,
    /// There is nothing to be told.
    #[error("no machines are configured{}", missing(.0))]
    NoMachines(Vec<String>),
    /// The runtime directory cannot be used.
    #[error(transparent)]
    Reach(#[from] ReachSetupError),
    /// The file of settings has a fault.
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

fn missing(files: &[String]) -> String {
    if files.is_empty() { String::new() } else { format!(" ({} does not exist)", files.join(", ")) }
}

impl VantageError {
    /// What to do about it.
    pub fn cure(&self) -> Option<String> {
        match self {
            Self::Nix(error) => Some(error.cure().to_owned()),
            Self::Location(_) => Some("name a store of this machine with --store".into()),
            Self::NotOurs(user, _) if user == "root" => {
                Some("run the same with sudo; for builds in a store of your own, name it with --store".into())
            }
            Self::NotOurs(user, _) => Some(format!(
                "run the same as {user}; for builds in a store of your own, name it with --store"
            )),
            Self::NoMachines(_) => {
                Some("set 'builders' in nix.conf, or name machines with --builders".into())
            }
            Self::Reach(error) => error.cure(),
            Self::Settings(error) => error.cure(),
            Self::NoState => None,
        }
    }

    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotOurs(..) => exit::NO_PERMISSION,
            _ => exit::CONFIG,
        }
    }
}

/// What the daemon of this machine has in its environment, if its hook runs as we do.
pub fn of_daemon() -> Option<View> {
    let daemon = nix_here::find_daemon(Path::new(DAEMON_SOCKET))?;
    let is_ours = daemon.uid == geteuid().as_raw();
    daemon.process.as_ref().filter(|_| is_ours).and_then(View::of)
}

/// What the hook has before it.
#[derive(Debug)]
pub struct Vantage {
    /// Nix's settings, as the Nix has them that starts the hook.
    pub settings: Settings,
    /// The local store.
    pub location: Location,
    builders: Option<String>,
    view: View,
    /// The user that the hook runs as, if it is not us.
    owner: Option<Uid>,
}

impl Vantage {
    /// Finds it.
    ///
    /// # Errors
    /// If Nix cannot be asked, or its builds are not for a local store.
    pub fn find(meant: &Meant) -> Result<Self, VantageError> {
        let daemon = nix_here::find_daemon(Path::new(DAEMON_SOCKET));
        let process = daemon.as_ref().and_then(|daemon| daemon.process.as_ref());
        let daemons = process.and_then(View::of).unwrap_or_else(View::everybody);
        // sudo's PATH may have no Nix.
        let own = View::own().or_program_of(&daemons);
        let asked = own.ask()?;
        let setting = meant.store.as_deref().or(asked.settings.get("store")).unwrap_or("auto");
        let is_usual = matches!(setting, "" | "auto");
        let found = Location::find(setting, |name| own.variable(name));
        let is_daemons = match &found {
            Ok(_) => is_usual && daemon.as_ref().is_some_and(|daemon| daemon.uid == geteuid().as_raw()),
            Err(LocationError::NotLocal { .. }) => {
                is_usual || setting.starts_with("daemon") || setting.starts_with("unix://")
            }
            Err(_) => false,
        };
        let builders = meant.builders.clone();
        if !is_daemons {
            return Ok(Self { settings: asked.settings, location: found?, builders, view: own, owner: None });
        }
        let owner = Uid::from_raw(daemon.as_ref().map_or(0, |daemon| daemon.uid));
        let settings = daemons.ask()?.settings;
        let location = Location::parse("auto", |name| daemons.variable(name))?;
        let owner = (owner != geteuid()).then_some(owner);
        Ok(Self { settings, location, builders, view: daemons, owner })
    }

    /// Refuses to go on if the hook runs as another user: its state is not ours to see or change.
    ///
    /// # Errors
    /// With the user.
    pub fn ours(&self) -> Result<(), VantageError> {
        let Some(owner) = self.owner else { return Ok(()) };
        let name = |uid: Uid| match User::from_uid(uid) {
            Ok(Some(user)) => user.name,
            _ => format!("user {uid}"),
        };
        Err(VantageError::NotOurs(name(owner), name(geteuid())))
    }

    /// A variable as the hook finds it.
    pub fn variable(&self, name: &str) -> Option<OsString> {
        self.view.variable(name)
    }

    /// One of Nix's programs.
    ///
    /// # Errors
    /// If there is no Nix.
    pub fn program(&self, name: &str) -> Result<PathBuf, VantageError> {
        Ok(self.view.program(name)?)
    }

    /// The list of machines, read anew.
    pub fn fleet(&self) -> Fleet {
        let (source, text) = match &self.builders {
            Some(text) => ("--builders", text.as_str()),
            None => ("builders", self.settings.get("builders").unwrap_or_default()),
        };
        config::fleet(&self.settings, source, text, &read_machines_file)
    }

    /// The same, where there must be some.
    ///
    /// # Errors
    /// If there are none, and no line that would be one without its fault.
    pub fn some_fleet(&self) -> Result<Fleet, VantageError> {
        let fleet = self.fleet();
        if fleet.machines.is_empty() && fleet.problems.is_empty() {
            return Err(VantageError::NoMachines(fleet.missing_files));
        }
        Ok(fleet)
    }

    /// The directory of what survives a restart.
    ///
    /// # Errors
    /// If the environment leads to none.
    pub fn state(&self) -> Result<PathBuf, VantageError> {
        state::directory(|name| self.variable(name)).ok_or(VantageError::NoState)
    }

    /// What leads to machines, and what is remembered of them.
    ///
    /// # Errors
    /// If the runtime directory cannot be used.
    pub fn reach(&self) -> Result<Reach, VantageError> {
        Ok(Reach::new(|name| self.variable(name))?.following(&self.settings))
    }

    /// The slots of machines, to be looked at.
    pub fn slots(&self) -> Slots {
        Slots::at(self.location.state_dir.join("current-load"))
    }

    /// What stands in offload.toml.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn offload<T: DeserializeOwned + Default>(&self) -> Result<T, VantageError> {
        Ok(offload::read(|name| self.variable(name))?)
    }
}
