//! Sending paths, in each of the ways that the protocols and their versions have.

use super::{BuilderError, Dump, Input, OnEvent, OnUpload, Output, handle, send};
use crate::path_info::PathInfo;
use crate::wire::worker::{self, Message, Version};
use crate::wire::{MAX_STRING, WireError, put_u64, serve};
use nix_derivation::StoreDir;
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::thread;

/// Bytes gathered into one frame.
const FRAME: usize = 64 << 10;

pub(super) fn send_many(
    output: &mut Output,
    store_dir: &StoreDir,
    infos: &[PathInfo],
    dump: Dump<'_>,
    progress: OnUpload<'_>,
) -> Result<(), BuilderError> {
    let mut head = Vec::new();
    worker::put_add_multiple(&mut head);
    send(output, "sending inputs", &head)?;
    let mut frames = Frames::new(output);
    put_u64(&mut frames.buffer, infos.len() as u64);
    for info in infos {
        progress(Some(info));
        worker::put_path_info(&mut frames.buffer, store_dir, info);
        frames.dump(info, store_dir, dump)?;
    }
    progress(None);
    frames.finish()
}

pub(super) fn send_framed(
    output: &mut Output,
    store_dir: &StoreDir,
    info: &PathInfo,
    dump: Dump<'_>,
) -> Result<(), BuilderError> {
    let mut head = Vec::new();
    worker::put_add_to_store_nar(&mut head, store_dir, info);
    send(output, "sending inputs", &head)?;
    let mut frames = Frames::new(output);
    frames.dump(info, store_dir, dump)?;
    frames.finish()
}

/// Sends one path to a daemon that asks for each piece (before 1.23).
#[expect(clippy::too_many_arguments, reason = "the parts of a borrowed builder")]
pub(super) fn send_asked(
    input: &mut Input,
    output: &mut Output,
    version: Version,
    builds: &mut BTreeSet<u64>,
    store_dir: &StoreDir,
    info: &PathInfo,
    dump: Dump<'_>,
    on: OnEvent<'_>,
) -> Result<(), BuilderError> {
    const DOING: &str = "sending inputs";
    let failed = |source| BuilderError::Dump { path: store_dir.render_path(&info.path), source };
    let mut head = Vec::new();
    worker::put_add_to_store_nar(&mut head, store_dir, info);
    send(output, DOING, &head)?;
    let (mut pieces, mut far_end) = io::pipe().map_err(failed)?;
    thread::scope(|scope| {
        let dumper = scope.spawn(move || dump(&info.path, &mut far_end));
        let mut talk = || loop {
            match worker::read_message(input, version).map_err(|e| BuilderError::wire(DOING, e))? {
                Message::Read { length } => {
                    let mut piece = Vec::new();
                    let length = length.min(FRAME as u64).min(MAX_STRING);
                    (&mut pieces).take(length).read_to_end(&mut piece).map_err(failed)?;
                    let mut request = Vec::new();
                    crate::wire::put_bytes(&mut request, &piece);
                    send(output, DOING, &request)?;
                }
                message => {
                    if handle(message, builds, DOING, on)? {
                        return Ok(());
                    }
                }
            }
        };
        let talked = talk();
        drop(pieces); // a dumper that still writes gets an error instead of waiting
        match dumper.join() {
            Ok(Err(source)) if source.kind() != io::ErrorKind::BrokenPipe => Err(failed(source)),
            _ => talked,
        }
    })
}

/// Sends one path to `nix-store --serve` (from 2.5): its metadata and the bare NAR, whose end only its size tells.
pub(super) fn send_nar(
    output: &mut Output,
    store_dir: &StoreDir,
    info: &PathInfo,
    dump: Dump<'_>,
) -> Result<(), BuilderError> {
    let mut head = Vec::new();
    serve::put_add_to_store_nar(&mut head, store_dir, info);
    send(output, "sending inputs", &head)?;
    let mut nar = Bare { output, sent: 0, broken: None };
    nar.dump(info, store_dir, dump)?;
    if nar.sent != info.nar_size {
        let text = format!("its NAR has {} bytes instead of {}", nar.sent, info.nar_size);
        let source = io::Error::new(io::ErrorKind::InvalidData, text);
        return Err(BuilderError::Dump { path: store_dir.render_path(&info.path), source });
    }
    output.flush().map_err(lost)
}

/// Sends paths to `nix-store --serve` before 2.5, as `nix-store --export` writes them.
pub(super) fn send_export(
    output: &mut Output,
    store_dir: &StoreDir,
    infos: &[PathInfo],
    dump: Dump<'_>,
    progress: OnUpload<'_>,
) -> Result<(), BuilderError> {
    let mut words = Vec::new();
    serve::put_import_paths(&mut words);
    for info in infos {
        progress(Some(info));
        put_u64(&mut words, 1);
        send(output, "sending inputs", &words)?;
        words.clear();
        Bare { output, sent: 0, broken: None }.dump(info, store_dir, dump)?;
        serve::put_export_tail(&mut words, store_dir, info);
    }
    put_u64(&mut words, 0);
    send(output, "sending inputs", &words)
}

/// Writes a NAR as it is.
struct Bare<'a> {
    output: &'a mut Output,
    sent: u64,
    /// Why the connection failed, to tell that from a failure to read the path.
    broken: Option<io::Error>,
}

impl Bare<'_> {
    fn dump(&mut self, info: &PathInfo, store_dir: &StoreDir, dump: Dump<'_>) -> Result<(), BuilderError> {
        let dumped = dump(&info.path, self);
        match (dumped, self.broken.take()) {
            (_, Some(source)) => Err(lost(source)),
            (Err(source), None) => {
                Err(BuilderError::Dump { path: store_dir.render_path(&info.path), source })
            }
            (Ok(()), None) => Ok(()),
        }
    }
}

impl Write for Bare<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self.output.write(data) {
            Ok(size) => {
                self.sent += size as u64;
                Ok(size)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let copy = io::Error::new(error.kind(), error.to_string());
                self.broken = Some(error);
                Err(copy)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a framed stream.
struct Frames<'a> {
    output: &'a mut Output,
    buffer: Vec<u8>,
    /// Why the connection failed, to tell that from a failure to read the path.
    broken: Option<io::Error>,
}

impl<'a> Frames<'a> {
    fn new(output: &'a mut Output) -> Self {
        Self { output, buffer: Vec::with_capacity(FRAME + 4096), broken: None }
    }

    fn dump(&mut self, info: &PathInfo, store_dir: &StoreDir, dump: Dump<'_>) -> Result<(), BuilderError> {
        match (dump(&info.path, self), self.broken.take()) {
            (_, Some(source)) => Err(lost(source)),
            (Err(source), None) => {
                Err(BuilderError::Dump { path: store_dir.render_path(&info.path), source })
            }
            (Ok(()), None) => Ok(()),
        }
    }

    fn finish(mut self) -> Result<(), BuilderError> {
        self.send_frame().and_then(|()| self.output.write_all(&[0; 8])).map_err(lost)?;
        self.output.flush().map_err(lost)
    }

    fn send_frame(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let length = (self.buffer.len() as u64).to_le_bytes();
        self.output.write_all(&length)?;
        self.output.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

fn lost(source: io::Error) -> BuilderError {
    BuilderError::Lost { doing: "sending inputs", source: WireError::Io { what: "a frame", source } }
}

impl Write for Frames<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(data);
        if self.buffer.len() >= FRAME
            && let Err(error) = self.send_frame()
        {
            let copy = io::Error::new(error.kind(), error.to_string());
            self.broken = Some(error);
            return Err(copy);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
