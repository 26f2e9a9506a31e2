//! The plot: makespans in relation to stock's.

use crate::scene::{Played, Plays, Result};
use std::fmt::Write as _;

const ROW: f64 = 30.0;
const LEFT: f64 = 190.0;
const TOP: f64 = 70.0;
const WIDTH: f64 = 480.0;
/// The scale ends here, in parts of stock's makespan.
const LONGEST: f64 = 1.1;

/// One row for each scene: ours, and the rule of stock in our hook, with stock as 100 %.
pub(crate) fn svg(results: &[Result]) -> String {
    let height = TOP + ROW * results.len() as f64 + 40.0;
    let x = |part: f64| LEFT + WIDTH * part.min(LONGEST) / LONGEST;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">Makespan in relation to Nix's own hook (simulation, medians; lines: all seeds)</text>\n\
         <rect x=\"10\" y=\"32\" width=\"12\" height=\"12\" fill=\"#2b6cb0\"/><text x=\"27\" y=\"43\">nix-offload</text>\n\
         <rect x=\"120\" y=\"32\" width=\"12\" height=\"12\" fill=\"#cbd5e0\"/><text x=\"137\" y=\"43\">nix-offload with nothing measured (stock's rule)</text>\n\
         <rect x=\"430\" y=\"32\" width=\"3\" height=\"12\" fill=\"#c05621\"/><text x=\"440\" y=\"43\">lower bound</text>\n",
        LEFT + WIDTH + 20.0
    );
    for step in 0..=5 {
        let part = f64::from(step) * 0.2;
        let colour = if step == 5 { "#1a202c" } else { "#e2e8f0" };
        let _ = writeln!(
            svg,
            "<line x1=\"{0:.1}\" y1=\"{1}\" x2=\"{0:.1}\" y2=\"{2}\" stroke=\"{colour}\"/><text x=\"{0:.1}\" y=\"{3}\" \
             text-anchor=\"middle\">{4:.0} %</text>",
            x(part),
            TOP - 5.0,
            height - 35.0,
            height - 15.0,
            part * 100.0
        );
    }
    for (row, result) in results.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let relative = |of: fn(&Played) -> &Plays| 1.0 - result.gain(of, |p| &p.stock).median;
        let (ours, unmeasured) = (relative(|p| &p.ours), relative(|p| &p.unmeasured));
        let ratios = result.played.iter().map(|p| p.ours.mean() / p.stock.mean());
        let (least, most) =
            ratios.fold((f64::INFINITY, 0.0_f64), |(least, most), r| (least.min(r), most.max(r)));
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{LEFT}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"10\" fill=\"#2b6cb0\"/>\
             <line x1=\"{:.1}\" y1=\"{2:.0}\" x2=\"{:.1}\" y2=\"{2:.0}\" stroke=\"#1a202c\"/>\
             <rect x=\"{LEFT}\" y=\"{:.0}\" width=\"{:.1}\" height=\"10\" fill=\"#cbd5e0\"/>\
             <rect x=\"{:.1}\" y=\"{y:.0}\" width=\"3\" height=\"20\" fill=\"#c05621\"/>",
            LEFT - 8.0,
            y + 14.0,
            result.scene.name(),
            x(ours) - LEFT,
            x(least),
            x(most),
            y + 10.0,
            x(unmeasured) - LEFT,
            x(relative(|p| &p.lower)),
        );
    }
    svg.push_str("</svg>\n");
    svg
}
