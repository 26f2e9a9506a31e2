//! Figures, goals, and how they are shown.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// One thing measured several times.
pub(crate) struct Figure {
    label: String,
    unit: &'static str,
    samples: Vec<f64>,
}

impl Figure {
    /// A figure with nothing measured yet.
    pub(crate) fn new(label: &str, unit: &'static str) -> Self {
        Self { label: label.into(), unit, samples: Vec::new() }
    }

    /// One more measurement.
    pub(crate) fn push(&mut self, sample: f64) {
        self.samples.push(sample);
    }

    /// All measurements of another one.
    pub(crate) fn append(&mut self, other: &Self) {
        self.samples.extend_from_slice(&other.samples);
    }

    /// How many measurements there are.
    pub(crate) fn count(&self) -> usize {
        self.samples.len()
    }

    /// What the tables call it.
    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    /// The value below which this share (0 to 1) of the samples lies.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * share).round() as usize]
    }

    /// The middle one, or what lies between the middle two.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let half = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) }
    }

    /// The largest.
    pub(crate) fn max(&self) -> f64 {
        self.quantile(1.0)
    }

    /// The sample that is least like this value.
    pub(crate) fn furthest_from(&self, value: f64) -> f64 {
        let distance = |sample: &&f64| (**sample - value).abs();
        let furthest = self.samples.iter().max_by(|a, b| distance(a).total_cmp(&distance(b)));
        furthest.copied().unwrap_or(f64::NAN)
    }

    /// How many times as large as this one the other is, by the medians, and from which to which in single rounds.
    pub(crate) fn times_less_than(&self, other: &Self) -> (f64, String) {
        let each = self.samples.iter().zip(&other.samples).map(|(own, other)| other / own);
        let (low, high) =
            each.fold((f64::INFINITY, 0.0_f64), |(low, high), ratio| (low.min(ratio), high.max(ratio)));
        (other.median() / self.median(), format!("{low:.1} to {high:.1} in single rounds"))
    }

    fn to_json(&self) -> Value {
        json!({
            "label": self.label, "unit": self.unit, "samples": self.samples,
            "min": self.quantile(0.0), "median": self.median(), "p99": self.quantile(0.99), "max": self.max(),
        })
    }
}

/// What is asked of a value.
pub(crate) enum Bound {
    /// Not less than this.
    AtLeast(f64),
    /// Not more than this.
    AtMost(f64),
    /// Less than this.
    Below(f64),
    /// This, neither more nor less.
    Exactly(f64),
}

impl Bound {
    /// In words, and its value.
    fn describe(&self) -> (&'static str, f64) {
        match *self {
            Self::AtLeast(bound) => ("at least", bound),
            Self::AtMost(bound) => ("at most", bound),
            Self::Below(bound) => ("below", bound),
            Self::Exactly(bound) => ("exactly", bound),
        }
    }
}

/// A value with a goal.
struct Goal {
    text: String,
    value: f64,
    bound: Bound,
}

impl Goal {
    fn is_met(&self) -> bool {
        match self.bound {
            Bound::AtLeast(bound) => self.value >= bound,
            Bound::AtMost(bound) => self.value <= bound,
            Bound::Below(bound) => self.value < bound,
            Bound::Exactly(bound) => (self.value - bound).abs() < f64::EPSILON,
        }
    }

    fn line(&self) -> String {
        let (relation, bound) = self.bound.describe();
        let verdict = if self.is_met() { "met   " } else { "MISSED" };
        format!("{verdict}  {}: {:.3} (goal: {relation} {bound})", self.text, self.value)
    }
}

/// One measurement: figures that belong together, and what follows from them.
pub(crate) struct Section {
    title: String,
    figures: Vec<Figure>,
    notes: Vec<String>,
    goals: Vec<Goal>,
}

impl Section {
    /// With all its figures.
    pub(crate) fn new(title: String, figures: Vec<Figure>) -> Self {
        Self { title, figures, notes: Vec::new(), goals: Vec::new() }
    }

    /// Adds a line for people.
    pub(crate) fn note(mut self, text: String) -> Self {
        self.notes.push(text);
        self
    }

    /// Adds a goal.
    pub(crate) fn goal(mut self, text: &str, value: f64, bound: Bound) -> Self {
        self.goals.push(Goal { text: text.into(), value, bound });
        self
    }

    fn table(&self) -> String {
        let mut text = format!("\n{}\n", self.title);
        let width = self.figures.iter().map(|figure| figure.label.len()).max().unwrap_or(0);
        writeln!(text, "  {:width$}  {:>10} {:>10} {:>10} {:>10}", "", "min", "median", "99 %", "max")
            .unwrap();
        for figure in &self.figures {
            let values = [figure.quantile(0.0), figure.median(), figure.quantile(0.99), figure.max()];
            let cells = values.map(|value| format!("{value:>10.2}"));
            writeln!(text, "  {:width$}  {} {}", figure.label, cells.join(" "), figure.unit).unwrap();
        }
        for note in &self.notes {
            writeln!(text, "  {note}").unwrap();
        }
        for goal in &self.goals {
            writeln!(text, "  {}", goal.line()).unwrap();
        }
        text
    }
}

/// Everything measured in a run.
#[derive(Default)]
pub(crate) struct Report {
    about: Option<String>,
    sections: Vec<Section>,
}

impl Report {
    /// Prints what one must know to compare it with another, and keeps it. Once is enough.
    pub(crate) fn describe(&mut self, about: impl FnOnce() -> String) {
        if self.about.is_none() {
            println!("{}", self.about.insert(about()));
        }
    }

    /// Adds a measurement and prints it.
    pub(crate) fn add(&mut self, section: Section) {
        print!("{}", section.table());
        self.sections.push(section);
    }

    /// The goals and whether they are met.
    pub(crate) fn summary(&self) -> String {
        let goals: Vec<String> =
            self.sections.iter().flat_map(|section| &section.goals).map(Goal::line).collect();
        goals.join("\n")
    }

    /// All samples and what follows from them.
    pub(crate) fn to_json(&self) -> String {
        let section = |section: &Section| {
            let goal = |goal: &Goal| {
                let (relation, bound) = goal.bound.describe();
                json!({
                    "text": goal.text, "value": goal.value, "relation": relation, "bound": bound, "met": goal.is_met(),
                })
            };
            json!({
                "title": section.title,
                "figures": section.figures.iter().map(Figure::to_json).collect::<Vec<_>>(),
                "goals": section.goals.iter().map(goal).collect::<Vec<_>>(),
                "notes": section.notes,
            })
        };
        let value = json!({
            "about": self.about,
            "sections": self.sections.iter().map(section).collect::<Vec<_>>(),
        });
        format!("{value:#}\n")
    }
}
