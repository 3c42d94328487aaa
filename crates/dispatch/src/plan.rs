//! Which row goes where: splits a layer call over the workers that hold its experts, and says how the answers are put
//! together again. A plain function of its input: the same routes and holders give the same frames. A frame that was lost
//! is split again in the same way over the workers that are left: its outputs take the place of rows.

use std::ops::Range;

use moesaic_kernels::cuda::{Addend, Kind};
use moesaic_proto::ExpertId;
use moesaic_proto::limits::FRAME_ROWS_MAX;

use crate::combine::CombineOps;
use crate::dispatcher::Route;
use crate::error::DispatchError;
use crate::frame::{Content, Output, PAYLOAD_BYTES_MAX, RequestFrame, Rows, Term};
use crate::shared::Shared;

/// The sizes that a plan needs.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub hidden: usize,
    /// Bytes of one activation: 4 or 2.
    pub value_bytes: usize,
    /// Experts of one logical group.
    pub group_size: usize,
    pub top_k: usize,
    /// Rows and payload bytes of one frame, or of its answer, at most.
    pub rows_max: usize,
    pub bytes_max: usize,
}

impl Layout {
    pub fn new(hidden: usize, value_bytes: usize, group_size: usize, top_k: usize) -> Self {
        Self { hidden, value_bytes, group_size, top_k, rows_max: FRAME_ROWS_MAX, bytes_max: PAYLOAD_BYTES_MAX }
    }

    /// Rows of one frame, whatever they ask for: its answer has at most `top_k` rows for each.
    pub fn frame_rows(&self) -> usize {
        let request = self.hidden * self.value_bytes + self.top_k * (size_of::<Output>() + size_of::<Term>());
        let answer = self.hidden * size_of::<f32>() * self.top_k;
        (self.bytes_max / request.max(answer)).clamp(1, self.rows_max)
    }
}

/// One frame to be.
#[derive(Debug)]
pub struct Part {
    /// Index of the destination among the placement's workers.
    pub worker: u32,
    pub content: Content,
}

impl Part {
    /// The frame's number of a row of the call, which is its newest one or comes next.
    fn row(&mut self, row: usize) -> u16 {
        let rows = &mut self.content.rows;
        if rows.last() != Some(&(row as u32)) {
            rows.push(row as u32);
        }
        (rows.len() - 1) as u16
    }

    fn ask(&mut self, output: Output, terms: impl IntoIterator<Item = Term>) {
        self.content.outputs.push(output);
        self.content.terms.extend(terms);
    }
}

/// The frames of a call and the recipe for its sums.
#[derive(Debug)]
pub struct Plan {
    pub parts: Vec<Part>,
    pub recipe: Recipe,
}

/// Where each addend of each row is, in the order of the additions.
#[derive(Debug, Default)]
pub struct Recipe {
    /// A whole group's sum, or the single expert that was asked for; or, where a group's experts went to several workers, the
    /// first of them and those that follow.
    addends: Vec<Addend>,
    /// For each row, where its addends end.
    ends: Vec<usize>,
}

/// Whether `routes` are those of x, [rows, hidden], each row's experts ascending.
pub fn check(x: &Rows<'_>, hidden: usize, experts: usize, top_k: usize, routes: &[Route]) -> Result<(), DispatchError> {
    let rows = x.len() / hidden;
    if top_k == 0 || !x.len().is_multiple_of(hidden) || rows * top_k != routes.len() {
        let (values, routes) = (x.len(), routes.len());
        let detail = format!("{values} values of rows of {hidden}, and {routes} routes of {top_k} a row");
        return Err(DispatchError::Input { detail });
    }
    for (row, routes) in routes.chunks_exact(top_k).enumerate() {
        let ascend = routes.windows(2).all(|pair| pair[0].expert < pair[1].expert);
        let valid = |route: &Route| usize::from(route.expert.0) < experts && route.weight.is_finite();
        if !ascend || !routes.iter().all(valid) {
            let detail = format!("row {row}: experts must ascend below {experts}, weights be finite: {routes:?}");
            return Err(DispatchError::Input { detail });
        }
    }
    Ok(())
}

/// A row's choices, ascending by expert, by their logical groups.
fn by_group<T>(row: &[T], group_size: usize, expert: impl Fn(&T) -> ExpertId) -> impl Iterator<Item = &[T]> {
    let group_of = move |choice: &T| usize::from(expert(choice).0) / group_size;
    row.chunk_by(move |a, b| group_of(a) == group_of(b))
}

/// Splits `routes` ([rows * top_k], each row's experts ascending); `holder` gives each expert its destination.
pub fn split(layout: &Layout, routes: &[Route], holder: impl Fn(ExpertId) -> u32) -> Plan {
    let rows = routes.len() / layout.top_k;
    let mut split = Splitter::new(layout, rows, rows);
    for (row, routes) in routes.chunks_exact(layout.top_k).enumerate() {
        for group in by_group(routes, layout.group_size, |route| route.expert) {
            let first = holder(group[0].expert);
            if group.iter().all(|route| holder(route.expert) == first) {
                split.ask_sum(row, first, group);
            } else {
                split.ask_singles(row, group, &holder);
            }
        }
        split.end_row();
    }
    split.plan
}

/// What `split` asks of a worker that has just these experts, of `terms` ([rows * top_k]): in one frame, whatever its size.
pub fn part_of(terms: &[Term], top_k: usize, group_size: usize, is_asked: impl Fn(ExpertId) -> bool) -> Content {
    let mut part = Part { worker: 0, content: Content::default() };
    for (row, terms) in terms.chunks_exact(top_k).enumerate() {
        for group in by_group(terms, group_size, |term| term.expert()) {
            if group.iter().all(|term| is_asked(term.expert())) {
                let output = Output::sum(part.row(row), group.len() as u16);
                part.ask(output, group.iter().copied());
                continue;
            }
            for term in group.iter().filter(|term| is_asked(term.expert())) {
                let output = Output::single(part.row(row));
                part.ask(output, [*term]);
            }
        }
    }
    part.content
}

/// Splits what a frame asks for: the recipe's rows are its outputs, in order.
pub fn resplit(layout: &Layout, frame: &RequestFrame, holder: impl Fn(ExpertId) -> u32) -> Plan {
    let mut split = Splitter::new(layout, frame.row_count(), frame.output_count());
    let mut routes = Vec::new();
    for (output, terms) in frame.outputs() {
        routes.clear();
        routes.extend(terms.iter().map(|term| Route { expert: term.expert(), weight: term.weight() }));
        let (row, first) = (frame.position(output.row()) as usize, holder(routes[0].expert));
        if !output.is_weighted() {
            split.ask_single(row, first, &routes[0]);
        } else if routes.iter().all(|route| holder(route.expert) == first) {
            split.ask_sum(row, first, &routes);
        } else {
            split.ask_singles(row, &routes, &holder);
        }
        split.end_row();
    }
    split.plan
}

struct Splitter {
    frame_rows: usize,
    /// Rows that a part is given room for.
    part_rows: usize,
    top_k: usize,
    /// For each worker, after those for whom there is none (`NOWHERE`), the part that takes its next row.
    open: Vec<Option<usize>>,
    plan: Plan,
}

impl Splitter {
    /// For so many rows of activations and of the recipe.
    fn new(layout: &Layout, rows: usize, recipe_rows: usize) -> Self {
        let addends = Vec::with_capacity(recipe_rows * layout.top_k);
        let recipe = Recipe { addends, ends: Vec::with_capacity(recipe_rows) };
        let plan = Plan { parts: Vec::new(), recipe };
        let frame_rows = layout.frame_rows();
        Self { frame_rows, part_rows: rows.min(frame_rows), top_k: layout.top_k, open: Vec::new(), plan }
    }

    fn end_row(&mut self) {
        self.plan.recipe.ends.push(self.plan.recipe.addends.len());
    }

    fn ask_single(&mut self, row: usize, worker: u32, route: &Route) {
        let part = self.part(worker, row);
        let target = &mut self.plan.parts[part];
        let output = Output::single(target.row(row));
        target.ask(output, [Term::from(route)]);
        self.add(part, Kind::Whole);
    }

    fn ask_sum(&mut self, row: usize, worker: u32, group: &[Route]) {
        let part = self.part(worker, row);
        let target = &mut self.plan.parts[part];
        let output = Output::sum(target.row(row), group.len() as u16);
        target.ask(output, group.iter().map(Term::from));
        self.add(part, Kind::Whole);
    }

    fn ask_singles(&mut self, row: usize, group: &[Route], holder: impl Fn(ExpertId) -> u32) {
        for (i, route) in group.iter().enumerate() {
            let part = self.part(holder(route.expert), row);
            let target = &mut self.plan.parts[part];
            let output = Output::single(target.row(row));
            target.ask(output, [Term::from(route)]);
            self.add(part, if i == 0 { Kind::First(route.weight) } else { Kind::Next(route.weight) });
        }
    }

    fn add(&mut self, part: usize, kind: Kind) {
        let output = self.plan.parts[part].content.outputs.len() - 1;
        self.plan.recipe.addends.push(Addend { answer: part, output, kind });
    }

    /// The part that takes this row for this worker: a new one where the row would make the open one too large.
    fn part(&mut self, worker: u32, row: usize) -> usize {
        let slot = worker.wrapping_add(1) as usize;
        if self.open.len() <= slot {
            self.open.resize(slot + 1, None);
        }
        if let Some(part) = self.open[slot] {
            let rows = &self.plan.parts[part].content.rows;
            if rows.len() < self.frame_rows || rows.last() == Some(&(row as u32)) {
                return part;
            }
        }
        let part = self.plan.parts.len();
        let content = Content {
            rows: Vec::with_capacity(self.part_rows),
            outputs: Vec::with_capacity(self.part_rows * self.top_k),
            terms: Vec::with_capacity(self.part_rows * self.top_k),
        };
        self.plan.parts.push(Part { worker, content });
        self.open[slot] = Some(part);
        part
    }
}

impl Recipe {
    pub fn rows(&self) -> usize {
        self.ends.len()
    }

    /// Where each addend is, row by row, in the order of the additions.
    pub fn addends(&self) -> &[Addend] {
        &self.addends
    }

    /// For each row, where its addends end.
    pub fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// y[row] = the sum of the row's groups, ascending; `answers` are the parts' in order.
    pub fn combine(&self, ops: &CombineOps, answers: &[Shared<f32>], hidden: usize, y: &mut [f32]) {
        let mut scratch = vec![0.0; hidden];
        let mut start = 0;
        for (y, &end) in y.chunks_exact_mut(hidden).zip(&self.ends) {
            self.combine_row(start..end, ops, answers, &mut scratch, y);
            start = end;
        }
    }

    fn combine_row(
        &self,
        addends: Range<usize>,
        ops: &CombineOps,
        answers: &[Shared<f32>],
        scratch: &mut [f32],
        y: &mut [f32],
    ) {
        let (mut rest, mut is_first) = (&self.addends[addends], true);
        while let Some(addend) = rest.first() {
            let singles = rest[1..].iter().take_while(|next| matches!(next.kind, Kind::Next(_))).count();
            let (group, after) = rest.split_at(1 + singles);
            rest = after;
            let sum = match addend.kind {
                Kind::Whole => value(addend, answers, y.len()),
                _ => {
                    sum_group(group, ops, answers, scratch);
                    &*scratch
                }
            };
            match std::mem::take(&mut is_first) {
                true => y.copy_from_slice(sum),
                false => (ops.add)(y, sum),
            }
        }
    }
}

/// `sum` = the weighted sum of single experts.
fn sum_group(group: &[Addend], ops: &CombineOps, answers: &[Shared<f32>], sum: &mut [f32]) {
    for addend in group {
        let value = value(addend, answers, sum.len());
        match addend.kind {
            Kind::First(weight) => (ops.first)(sum, weight, value),
            Kind::Next(weight) => (ops.next)(sum, weight, value),
            Kind::Whole => {}
        }
    }
}

fn value<'a>(addend: &Addend, answers: &'a [Shared<f32>], hidden: usize) -> &'a [f32] {
    &answers[addend.answer][addend.output * hidden..][..hidden]
}

#[cfg(test)]
mod tests;
