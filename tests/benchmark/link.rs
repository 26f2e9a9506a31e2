//! A long link: what each build waits for.

use std::time::Duration;

use crate::{
    many::chain_expression,
    report::{Bound, Figure, Section},
    scene::{Contender, Link, Scene},
};

/// There and back.
pub(crate) const ROUND_TRIP: Duration = Duration::from_millis(50);
const GOAL: f64 = 2.5;

/// The same chain over a link with a delay and over one without; what it takes longer is round trips.
///
/// `count` builds of ours, `stock_count` of the others.
pub(crate) fn link(scene: &Scene, count: u32, stock_count: u32, rounds: u32) -> Section {
    let round_trip = ROUND_TRIP.as_secs_f64() * 1000.0;
    let mut figures = Contender::REMOTE.map(|contender| {
        let figure = |what: &str, unit| Figure::new(&format!("{}: {what}", contender.label()), unit);
        [
            figure("a build without delay", "ms"),
            figure("a build over the link", "ms"),
            figure("round trips of a build", ""),
            figure("flights of a build, as the link counts them", ""),
        ]
    });
    for _ in 0..rounds {
        for (contender, [near, far, trips, flights]) in Contender::REMOTE.into_iter().zip(&mut figures) {
            let count = if contender == Contender::Ours { count } else { stock_count };
            let each = |link| {
                let output =
                    scene.build_over(contender, link, &chain_expression(&scene.fresh("link"), count));
                output.took().as_secs_f64() * 1000.0 / f64::from(count)
            };
            let short = each(Link::Near);
            let before = scene.flights();
            let long = each(Link::Far);
            flights.push((scene.flights() - before) as f64 / f64::from(count));
            near.push(short);
            far.push(long);
            trips.push((long - short) / round_trip);
        }
    }
    let ours = figures[2][2].median();
    let title = format!(
        "A chain of {count} trivial builds (stock: {stock_count}) over a link with a round trip of {round_trip} ms, \
         {rounds} rounds"
    );
    Section::new(title, figures.into_iter().flatten().collect())
        .note("round trips are the time over the link, less that without delay, by the round trip".into())
        .goal("link: round trips of a build", ours, Bound::AtMost(GOAL))
}
