//! Where a NAR ends, seen from its framing alone.
//!
//! Must never know what is in it, nor refuse one: that is for whoever unpacks it.
//!
//! Source: Nix 2.34 `src/libutil/archive.cc` (`dump`).

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

/// Length of a word's length.
const LENGTH: usize = 8;

/// Room for every word of the grammar with its padding; the longest is `nix-archive-1`.
const MOST: usize = 16;

/// Looks for the end of a NAR that passes in pieces.
#[derive(Debug, Default)]
pub struct NarEnd {
    /// Length, then text of the word at hand, with its padding.
    word: [u8; LENGTH + MOST],
    /// How much of it has come.
    have: usize,
    /// So much of a name, a target or a file's contents is still to come.
    skip: u64,
    /// The next word is such a one, whatever it says.
    is_data: bool,
    depth: u64,
    state: State,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Within,
    Ended,
    /// It is no NAR, so that it has no end that could be seen.
    Lost,
}

impl NarEnd {
    /// Whether it has passed.
    pub fn is_over(&self) -> bool {
        self.state == State::Ended
    }

    /// Takes the next bytes, and gives how many of them belong to the archive. All do that are no archive.
    pub fn pass(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        while !rest.is_empty() && self.state == State::Within {
            let taken = if self.skip > 0 { self.leap(rest.len()) } else { self.collect(rest) };
            rest = &rest[taken..];
        }
        if self.state == State::Lost { bytes.len() } else { bytes.len() - rest.len() }
    }

    fn leap(&mut self, most: usize) -> usize {
        let step = usize::try_from(self.skip).unwrap_or(usize::MAX).min(most);
        self.skip -= step as u64;
        step
    }

    /// Takes bytes of a word, none behind it.
    fn collect(&mut self, bytes: &[u8]) -> usize {
        let end = if self.have < LENGTH { LENGTH } else { self.end_of_word() };
        let step = (end - self.have).min(bytes.len());
        self.word[self.have..self.have + step].copy_from_slice(&bytes[..step]);
        self.have += step;
        if self.have == LENGTH {
            self.begin_word();
        }
        if self.have >= LENGTH && self.have == self.end_of_word() {
            self.finish_word();
        }
        step
    }

    fn length(&self) -> u64 {
        let mut length = [0; LENGTH];
        length.copy_from_slice(&self.word[..LENGTH]);
        u64::from_le_bytes(length)
    }

    fn end_of_word(&self) -> usize {
        LENGTH + self.length().next_multiple_of(8) as usize
    }

    fn begin_word(&mut self) {
        let length = self.length();
        if self.is_data {
            self.is_data = false;
            self.have = 0;
            self.skip = length.checked_next_multiple_of(8).unwrap_or(u64::MAX);
        } else if length > MOST as u64 {
            self.have = 0;
            self.state = State::Lost;
        }
    }

    fn finish_word(&mut self) {
        match &self.word[LENGTH..LENGTH + self.length() as usize] {
            b"(" => self.depth += 1,
            b")" => match self.depth {
                0 => self.state = State::Lost,
                1 => self.state = State::Ended,
                _ => self.depth -= 1,
            },
            b"name" | b"target" | b"contents" => self.is_data = true,
            _ => {}
        }
        self.have = 0;
    }
}
