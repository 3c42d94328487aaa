//! Experts that compute a simple function, and the sum that must come out of them: for the tests of `plan` and `tracker`.

use moesaic_proto::ExpertId;

use crate::combine::CombineOps;
use crate::dispatcher::Route;
use crate::frame::{Activations, RequestFrame, Term};
use crate::shared::Shared;

pub const OPS: CombineOps = CombineOps {
    first: |y, w, x| y.iter_mut().zip(x).for_each(|(y, x)| *y = w * x),
    next: |y, w, x| y.iter_mut().zip(x).for_each(|(y, x)| *y = w.mul_add(*x, *y)),
    add: |y, x| y.iter_mut().zip(x).for_each(|(y, x)| *y += x),
};

/// Any function with rounding in it will do.
fn expert_row(expert: ExpertId, x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| (x * (0.3 + f32::from(expert.0) * 0.7)).sin() + 0.1).collect()
}

fn weighted(x: &[f32], terms: impl Iterator<Item = (ExpertId, f32)>) -> Option<Vec<f32>> {
    let mut sum = None;
    for (expert, weight) in terms {
        let value = expert_row(expert, x);
        match &mut sum {
            None => sum = Some(value.iter().map(|value| weight * value).collect::<Vec<_>>()),
            Some(sum) => (OPS.next)(sum, weight, &value),
        }
    }
    sum
}

/// What a worker answers to a frame of f32 rows.
pub fn answer(frame: &RequestFrame, hidden: usize) -> Shared<f32> {
    let Activations::F32(values) = frame.activations() else { panic!("the tests send f32") };
    let mut y = Vec::new();
    for (output, terms) in frame.outputs() {
        let x = &values[frame.position(output.row()) as usize * hidden..][..hidden];
        match output.is_weighted() {
            true => y.extend(weighted(x, terms.iter().map(|term: &Term| (term.expert(), term.weight()))).unwrap()),
            false => y.extend(expert_row(terms[0].expert(), x)),
        }
    }
    y.into()
}

/// Rule 1(c): groups of `group_size` experts ascending, experts of a group ascending.
pub fn expected(x: &[f32], hidden: usize, top_k: usize, group_size: usize, routes: &[Route]) -> Vec<f32> {
    let mut y = Vec::new();
    for (x, routes) in x.chunks(hidden).zip(routes.chunks(top_k)) {
        let group_of = |route: &Route| usize::from(route.expert.0) / group_size;
        let groups = routes.chunk_by(|a, b| group_of(a) == group_of(b));
        let mut sums = groups.map(|group| weighted(x, group.iter().map(|r| (r.expert, r.weight))).unwrap());
        let mut sum = sums.next().unwrap();
        sums.for_each(|group| (OPS.add)(&mut sum, &group));
        y.extend(sum);
    }
    y
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
