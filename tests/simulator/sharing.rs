//! Something that several users share equally: the processors of a machine, one direction of a link.

/// Users and what each of them still has to get.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shared {
    users: Vec<(usize, f64)>,
    /// What each gets per second.
    rate: f64,
    since: f64,
    /// Changes with every change, so that an end that was foretold before is known to be void.
    pub(crate) version: u64,
}

impl Shared {
    pub(crate) fn len(&self) -> usize {
        self.users.len()
    }

    pub(crate) fn users(&self) -> impl Iterator<Item = usize> + '_ {
        self.users.iter().map(|(user, _)| *user)
    }

    /// Lets the time up to now pass at the rate so far.
    pub(crate) fn advance(&mut self, now: f64) {
        let done = (now - self.since) * self.rate;
        self.users.iter_mut().for_each(|(_, left)| *left -= done);
        self.since = now;
    }

    /// From now on each user gets `rate` per second. Gives the time at which the first of them has all.
    pub(crate) fn go_on(&mut self, rate: f64) -> Option<f64> {
        self.rate = rate;
        self.version += 1;
        let least = self.users.iter().map(|(_, left)| *left).min_by(f64::total_cmp)?;
        Some(self.since + least.max(0.0) / rate)
    }

    pub(crate) fn add(&mut self, user: usize, amount: f64) {
        self.users.push((user, amount));
    }

    /// Takes out the user who has all.
    pub(crate) fn finish(&mut self) -> Option<usize> {
        let least = (0..self.users.len()).min_by(|a, b| self.users[*a].1.total_cmp(&self.users[*b].1))?;
        Some(self.users.remove(least).0)
    }

    /// Takes out one who gives up.
    pub(crate) fn remove(&mut self, user: usize) {
        self.users.retain(|(other, _)| *other != user);
    }

    pub(crate) fn clear(&mut self) {
        self.users.clear();
        self.version += 1;
    }
}
