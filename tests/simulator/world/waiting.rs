//! Builds that wait in hooks of ours for a slot, and builds that do not stay where they began.

use super::{Contender, Event, What, World};
use crate::site::{Site, clock};
use nix_offload::plan::turn;
use nix_offload::plan::{Because, Verdict};
use std::collections::BTreeMap;
use std::time::SystemTime;

/// A build that waits looks again after so long even if nothing happens.
const LOOK_AGAIN: f64 = 2.0;

/// A build that waits in a hook of ours, in the line of those that wait for the same machines.
pub(super) struct Place {
    job: usize,
    /// What it waits for: one of these machines.
    wish: Vec<usize>,
    /// When it counts as having come.
    ticket: SystemTime,
    /// When it came to this line, as a number.
    number: u64,
    /// When it became the first of its line, which it stays.
    turn: Option<u64>,
    is_held_back: bool,
}

impl World<'_> {
    /// The build waits for one of these machines.
    pub(super) fn wait_for(&mut self, job: usize, wish: Vec<usize>, is_held_back: bool) {
        let since = clock(self.jobs[job].asked.unwrap_or(self.now));
        let ticket = turn::ticket(since, self.tails[job]);
        self.places += 1;
        let place = Place { job, wish, ticket, number: self.places, turn: None, is_held_back };
        self.waiting.push(place);
        self.look_later();
    }

    /// The first of each line is served, as far as there is what it wants; the one that has been that for longer before the
    /// others. One that is held back for a machine goes to the line of that, so that the next one may take what is free.
    pub(super) fn serve_waiting(&mut self) {
        while self.sites.iter().any(Site::is_free) {
            self.give_turns();
            let mut first: Vec<(u64, usize)> =
                self.waiting.iter().enumerate().filter_map(|(at, place)| Some((place.turn?, at))).collect();
            first.sort_unstable();
            if !first.into_iter().any(|(_, at)| self.serve(at)) {
                break;
            }
        }
        self.look_later();
    }

    /// Whether this one goes somewhere: to a machine or to another line.
    fn serve(&mut self, at: usize) -> bool {
        let job = self.waiting[at].job;
        match self.decide(job) {
            (Verdict::Accept(site), _) => {
                self.waiting.remove(at);
                self.start(job, site);
                true
            }
            (Verdict::Wait(wish), because) => {
                let place = &self.waiting[at];
                let holds_back = because == Because::HeldBack;
                if holds_back == place.is_held_back || place.wish == wish {
                    return false;
                }
                self.waiting.remove(at);
                self.wait_for(job, wish, holds_back);
                true
            }
            _ => false,
        }
    }

    /// Lines without a first one get one.
    fn give_turns(&mut self) {
        let mut first: BTreeMap<&[usize], usize> = BTreeMap::new();
        let key = |place: &Place| (place.turn.is_none(), place.ticket, place.number);
        for (at, place) in self.waiting.iter().enumerate() {
            let first = first.entry(&place.wish).or_insert(at);
            if key(place) < key(&self.waiting[*first]) {
                *first = at;
            }
        }
        for at in first.into_values().collect::<Vec<_>>() {
            if self.waiting[at].turn.is_none() {
                self.places += 1;
                self.waiting[at].turn = Some(self.places);
            }
        }
    }

    /// Builds that will have slots of this machine before this one. What is new comes behind all that wait for it; one
    /// that waits comes behind those that cannot go anywhere else.
    pub(super) fn ahead(&self, job: usize, site: usize) -> u64 {
        let own = self.waiting.iter().find(|place| place.job == job).map(|place| &place.wish);
        let is_ahead = |place: &&Place| {
            let is_narrower = |own: &Vec<usize>| {
                place.wish.len() < own.len() && place.wish.iter().all(|site| own.contains(site))
            };
            place.wish.contains(&site) && own.is_none_or(is_narrower)
        };
        self.waiting.iter().filter(is_ahead).count() as u64
    }

    /// Whether what is new stands behind others there.
    pub(super) fn is_behind(&self, job: usize, site: usize) -> u64 {
        if self.waiting.iter().any(|place| place.job == job) { 0 } else { self.ahead(job, site) }
    }

    /// What a hook says to Nix. Where nothing is free and nobody may wait it need not be asked.
    pub(super) fn answer(&mut self, job: usize) -> (Verdict, Because) {
        let may_wait = self.contender != Contender::Stock && self.may_wait(&self.all());
        match may_wait || self.sites.iter().any(Site::is_free) {
            true => self.decide(job),
            false => (Verdict::Postpone(Vec::new()), Because::Full),
        }
    }

    pub(super) fn all(&self) -> Vec<usize> {
        (0..self.sites.len()).collect()
    }

    /// Whether one build more may wait for these machines.
    pub(super) fn may_wait(&self, wish: &[usize]) -> bool {
        let same = self.waiting.iter().filter(|place| place.wish == wish).count() as u64;
        same < self.rules.max_waiting
    }

    /// Builds on machines that are slow or crowded begin anew on better ones for which nobody waits.
    pub(super) fn move_builds(&mut self) {
        for from in 0..self.sites.len() {
            let jobs: Vec<usize> = self.sites[from].builds.users().collect();
            for job in jobs {
                let is_any_free = self.sites.iter().any(Site::is_free);
                if !is_any_free || !self.waiting.is_empty() || !self.postponed.is_empty() {
                    return;
                }
                let Some(to) = self.better_place(job, from) else { continue };
                self.advance(from, What::Build);
                self.sites[from].builds.remove(job);
                self.go_on(from, What::Build);
                self.jobs[job].attempt += 1;
                self.jobs[job].was_moved = true;
                self.outcome.moved += 1;
                self.give_back(job, from);
                self.start(job, to);
            }
        }
    }

    pub(super) fn look_later(&mut self) {
        if !self.waiting.is_empty() && !self.is_looking {
            self.is_looking = true;
            self.after(LOOK_AGAIN, Event::Look);
        }
    }
}
