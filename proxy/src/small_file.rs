//! Small files that processes leave for each other: made with their directory, written whole, and read if they are ours.
//!
//! Must never know what they say.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use nix::{fcntl::OFlag, unistd::geteuid};

/// What the name of a file ends with while it is written.
pub const NEW: &str = "new";

/// Does something with a file. If that fails because its directory is missing, the directory is made, for us alone, and
/// it is done again. The one above is not made.
///
/// # Errors
/// Of the last attempt.
pub fn in_directory<T>(path: &Path, act: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match (act(), path.parent()) {
        (Err(error), Some(directory)) if error.kind() == io::ErrorKind::NotFound => {
            // Another process may make it at the same time.
            let _ = DirBuilder::new().mode(0o700).create(directory);
            act()
        }
        (done, _) => done,
    }
}

/// Writes a file, for us alone, or replaces it, in one step, whoever else does so at the same moment. Until then what is
/// written is called like the file, with an extension of a number of its own and [`NEW`]. Whoever is killed meanwhile
/// leaves that behind.
///
/// # Errors
/// If it cannot be written. Then the file is as it was.
pub fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    replace(path, text, |_| Ok(()))
}

/// The same, and what is written is there after a loss of power too.
///
/// # Errors
/// If it cannot be written. The file is as it was, or it is not known whether it would outlast such a loss.
pub fn write_to_last(path: &Path, text: &str) -> io::Result<()> {
    replace(path, text, File::sync_all)?;
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

fn replace(path: &Path, text: &str, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    // No other process has this name, and nobody else can have made it before.
    let number = RandomState::new().build_hasher().finish();
    let new = path.with_extension(format!("{number:x}.{NEW}"));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())
        .and_then(|()| sync(&file))
        .and_then(|()| fs::rename(&new, path))
        .inspect_err(|_| drop(fs::remove_file(&new)))
}

/// Reads a file of ours: a regular one, of `most` bytes at most, that nobody else can have written. No link is followed,
/// and nobody is waited for.
///
/// # Errors
/// If there is none, or it is something else, or it is no text.
pub fn read_own(path: &Path, most: u64) -> io::Result<String> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.uid() != geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(io::Error::other("it is not a file that only its owner can write to"));
    }
    if metadata.len() > most {
        return Err(io::Error::other(format!("it has more than {most} bytes")));
    }
    let mut text = String::with_capacity(metadata.len() as usize + 1);
    file.take(most).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_missing_directory_is_made_and_not_the_one_above_it() {
        let above = tempfile::tempdir().unwrap();
        let directory = above.path().join("made");
        let path = directory.join("f");
        in_directory(&path, || write_whole(&path, "x")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&path)), (0o700, 0o600));
        let deep = above.path().join("no/such/f");
        let error = in_directory(&deep, || write_whole(&deep, "x")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(!above.path().join("no").exists());
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f.json");
        write_whole(&path, "a long one").unwrap();
        // Who reads it meanwhile has the old one to its end.
        let before = File::open(&path).unwrap();
        write_whole(&path, "short").unwrap();
        assert_eq!(io::read_to_string(before).unwrap(), "a long one");
        assert_eq!(fs::read_to_string(&path).unwrap(), "short");
        let occupied = directory.path().join("d");
        fs::create_dir_all(occupied.join("x")).unwrap();
        write_whole(&occupied, "x").unwrap_err();
        write_to_last(&occupied, "x").unwrap_err();
        write_to_last(&path, "lasting").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "lasting");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_others_could_have_written_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        assert_eq!(read_own(&path, 9).unwrap_err().kind(), io::ErrorKind::NotFound);
        write_whole(&path, "x").unwrap();
        assert_eq!(read_own(&path, 1).unwrap(), "x");
        assert!(read_own(&path, 0).unwrap_err().to_string().contains("more than 0 bytes"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o662)).unwrap();
        read_own(&path, 9).unwrap_err();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&path, directory.path().join("link")).unwrap();
        read_own(&directory.path().join("link"), 9).unwrap_err();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        read_own(&fifo, 9).unwrap_err();
        read_own(directory.path(), 9).unwrap_err();
        fs::write(&path, [0xff]).unwrap();
        read_own(&path, 9).unwrap_err();
    }
}
