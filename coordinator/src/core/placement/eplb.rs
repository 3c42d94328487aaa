//! EPLB, the reference algorithm for balancing experts (DeepSeek, github.com/deepseek-ai/EPLB), written from its
//! description. The measure that `planner` is held against: it balances well, but it knows neither failure domains
//! (its hierarchical form keeps all copies of an expert on one node, and two copies may share a worker) nor the plan in
//! force.

use std::cmp::Reverse;

/// `physical_to_logical[layer][slot]`: the expert in each of `replicas` slots, those of a GPU next to each other.
///
/// `weight[layer][expert]` are token counts. Hierarchical where the nodes divide the `groups`: whole groups are packed
/// onto nodes, and copies are made inside a node. Otherwise global: one group, one node.
///
/// Panics if the nodes do not divide the GPUs, the GPUs the replicas or the groups the experts, or if there are fewer
/// replicas than experts.
pub fn eplb(weight: &[Vec<f32>], replicas: usize, groups: usize, nodes: usize, gpus: usize) -> Vec<Vec<usize>> {
    let (groups, nodes) = if groups.is_multiple_of(nodes) { (groups, nodes) } else { (1, 1) };
    assert!(gpus.is_multiple_of(nodes) && replicas.is_multiple_of(gpus), "{replicas} replicas on {gpus} GPUs");
    weight.iter().map(|weight| balance_layer(weight, replicas / nodes, groups, nodes, gpus / nodes)).collect()
}

/// `replicas` and `gpus` are those of one node.
fn balance_layer(weight: &[f32], replicas: usize, groups: usize, nodes: usize, gpus: usize) -> Vec<usize> {
    assert!(weight.len().is_multiple_of(groups) && replicas * nodes >= weight.len(), "{groups} groups");
    let group_size = weight.len() / groups;
    let group_weight: Vec<f32> = weight.chunks(group_size).map(|group| group.iter().sum()).collect();
    let mut slots = Vec::with_capacity(replicas * nodes);
    for node in pack(&group_weight, nodes) {
        let experts: Vec<usize> = node.iter().flat_map(|g| g * group_size..(g + 1) * group_size).collect();
        let of_experts: Vec<f32> = experts.iter().map(|e| weight[*e]).collect();
        let (copies, counts) = replicate(&of_experts, replicas);
        let of_copies: Vec<f32> = copies.iter().map(|i| of_experts[*i] / counts[*i] as f32).collect();
        slots.extend(pack(&of_copies, gpus).concat().iter().map(|copy| experts[copies[*copy]]));
    }
    slots
}

/// Balanced packing: the items of each of `bins` bins, all of the same number. The heaviest item goes first, always
/// into the lightest bin that has room; ties go to the first.
fn pack(weight: &[f32], bins: usize) -> Vec<Vec<usize>> {
    let room = weight.len() / bins;
    if room == 1 {
        return (0..bins).map(|item| vec![item]).collect();
    }
    let mut order: Vec<usize> = (0..weight.len()).collect();
    order.sort_by(|a, b| weight[*b].total_cmp(&weight[*a]));
    let mut packed = vec![(0f32, Vec::with_capacity(room)); bins];
    for item in order {
        let open = packed.iter_mut().filter(|(_, items)| items.len() < room);
        if let Some((sum, items)) = open.min_by(|a, b| a.0.total_cmp(&b.0)) {
            *sum += weight[item];
            items.push(item);
        }
    }
    packed.into_iter().map(|(_, items)| items).collect()
}

/// Replication: the item of each of `slots` slots, and how many slots each item has. One for each first; each further
/// slot goes to the item with the greatest weight for a copy.
fn replicate(weight: &[f32], slots: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut items, mut counts): (Vec<usize>, _) = ((0..weight.len()).collect(), vec![1; weight.len()]);
    while items.len() < slots {
        let share = |i: usize| weight[i] / counts[i] as f32;
        // The first of those that tie: max_by alone would take the last.
        let Some(next) =
            (0..weight.len()).max_by(|a, b| share(*a).total_cmp(&share(*b)).then(Reverse(a).cmp(&Reverse(b))))
        else {
            break;
        };
        counts[next] += 1;
        items.push(next);
    }
    (items, counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the reference's README.
    #[test]
    fn the_published_example_comes_out() {
        let weight = [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ];
        let weight = weight.map(|layer| layer.map(|tokens| tokens as f32).to_vec());
        let expected =
            [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]];
        assert_eq!(eplb(&weight, 16, 4, 2, 8), expected);
    }

    #[test]
    fn globally_every_expert_has_a_slot_and_the_heaviest_has_the_spare_one() {
        // 9/2 + 2 on the first GPU, 9/2 + 1 on the second.
        assert_eq!(eplb(&[vec![1.0, 9.0, 2.0]], 4, 1, 2, 2), [[1, 2, 1, 0]]);
    }
}
