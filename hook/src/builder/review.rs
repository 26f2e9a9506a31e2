//! Looking in on a build that runs: when, and how it is called off.
//!
//! Must never know what is looked for.

use std::fmt;
use std::time::{Duration, Instant};

/// How long, at most, what the far side has said already is read before a build is given up that was called off: it may
/// have ended.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// How long nothing must have come for the far side to have said all.
const PAUSE: Duration = Duration::from_millis(5);

/// Who looks in on a build that runs, and when.
#[derive(Clone, Copy)]
pub struct Review<'a> {
    /// How long after the build began the first time is.
    pub first: Duration,
    /// How long after the one before each other time is.
    pub every: Duration,
    /// Told how long the build has run. If this says so it is called off, unless it has ended meanwhile.
    pub calls_off: &'a dyn Fn(Duration) -> bool,
}

impl fmt::Debug for Review<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, every, .. } = self;
        f.debug_struct("Review").field("first", first).field("every", every).finish_non_exhaustive()
    }
}

/// The reviews of one build.
#[derive(Debug)]
pub(super) struct Reviews<'a> {
    review: Option<Review<'a>>,
    began: Instant,
    next: Option<Instant>,
    /// It was called off; then its last words are read.
    last: Option<Instant>,
}

/// What is to be done while nothing has come from the far side, or before it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// To wait until then, if there is such a time.
    Wait(Option<Instant>),
    /// All the clocks go on from here, by the time that looking took.
    Looked(Duration),
    /// To give it up.
    Over,
}

impl<'a> Reviews<'a> {
    /// Those of a build that begins now.
    pub(super) fn begin(review: Option<Review<'a>>) -> Self {
        let began = Instant::now();
        let next = review.and_then(|review| began.checked_add(review.first));
        Self { review, began, next, last: None }
    }

    /// Whether there can be any.
    pub(super) fn is_any(&self) -> bool {
        self.review.is_some()
    }

    /// Looks, if it is time.
    pub(super) fn due(&mut self) -> Due {
        let (Some(review), Some(next)) = (self.review, self.next) else { return Due::Wait(None) };
        let now = Instant::now();
        match self.last {
            Some(last) if now >= last => Due::Over,
            Some(_) => Due::Wait(now.checked_add(PAUSE)),
            None if now < next => Due::Wait(Some(next)),
            None => {
                let is_called_off = (review.calls_off)(now.saturating_duration_since(self.began));
                let then = Instant::now();
                self.next = then.checked_add(review.every);
                self.last = then.checked_add(LAST_WORDS).filter(|_| is_called_off);
                Due::Looked(then.saturating_duration_since(now))
            }
        }
    }

    /// Nothing came until the time that was to be waited for. Whether the build is to be given up for that.
    pub(super) fn is_over(&self) -> bool {
        self.last.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_build_is_looked_at_now_and_then_until_it_is_called_off() {
        let (seen, limit) = (Cell::new(0), Cell::new(3));
        let calls_off = |ran: Duration| {
            assert!(ran >= Duration::from_millis(2));
            seen.set(seen.get() + 1);
            seen.get() == limit.get()
        };
        let millis = Duration::from_millis;
        let review = Review { first: millis(2), every: millis(1), calls_off: &calls_off };
        let mut reviews = Reviews::begin(Some(review));
        while !reviews.is_over() {
            if let Due::Wait(until) = reviews.due() {
                std::thread::sleep(until.unwrap().saturating_duration_since(Instant::now()));
            }
        }
        assert_eq!(seen.get(), 3);
        while reviews.due() != Due::Over {}
        assert_eq!(seen.get(), 3, "its last words are read, and nobody looks any more");
        let mut none = Reviews::begin(None);
        assert_eq!((none.due(), none.is_any(), none.is_over()), (Due::Wait(None), false, false));
    }
}
