//! Who owns which page of the latent cache. A page has at most one owner, and free + used = total, always.

use super::batcher::SequenceId;

pub struct Pages {
    /// Taken from the end.
    free: Vec<u32>,
    owners: Vec<Option<SequenceId>>,
}

impl Pages {
    pub fn new(total: u32) -> Self {
        Self { free: (0..total).rev().collect(), owners: vec![None; total as usize] }
    }

    pub fn total(&self) -> usize {
        self.owners.len()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// `count` pages, or none at all.
    pub fn take(&mut self, owner: SequenceId, count: usize) -> Option<Vec<u32>> {
        let rest = self.free.len().checked_sub(count)?;
        let pages = self.free.split_off(rest);
        for &page in &pages {
            debug_assert_eq!(self.owners[page as usize], None, "page {page} is free and owned");
            self.owners[page as usize] = Some(owner);
        }
        Some(pages)
    }

    /// Takes pages back from their owner.
    pub fn give_back(&mut self, owner: SequenceId, pages: Vec<u32>) {
        for &page in &pages {
            assert_eq!(self.owners[page as usize].take(), Some(owner), "page {page} comes back from another owner");
        }
        self.free.extend(pages);
        debug_assert_eq!(self.free.len(), self.owners.iter().filter(|owner| owner.is_none()).count());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_or_nothing_and_nothing_twice() {
        let mut pages = Pages::new(3);
        let (a, b) = (SequenceId(1), SequenceId(2));
        let held = pages.take(a, 2).unwrap();
        assert_eq!(pages.take(b, 2), None);
        assert_eq!((pages.free(), pages.total()), (1, 3));
        let other = pages.take(b, 1).unwrap();
        assert!(!held.contains(&other[0]));
        pages.give_back(a, held);
        assert_eq!(pages.free(), 2);
    }

    #[test]
    #[should_panic(expected = "another owner")]
    fn a_page_comes_back_from_its_owner_only() {
        let mut pages = Pages::new(1);
        let held = pages.take(SequenceId(1), 1).unwrap();
        pages.give_back(SequenceId(2), held);
    }

    proptest! {
        #[test]
        fn free_and_used_are_the_total(total in 0u32..20, steps in prop::collection::vec((0u64..5, 0usize..6), 0..60)) {
            let mut pages = Pages::new(total);
            let mut held: Vec<Vec<u32>> = vec![Vec::new(); 5];
            for (owner, count) in steps {
                let mine = &mut held[owner as usize];
                match pages.take(SequenceId(owner), count) {
                    Some(taken) => mine.extend(taken),
                    None => pages.give_back(SequenceId(owner), std::mem::take(mine)),
                }
                let mut used: Vec<u32> = held.iter().flatten().copied().collect();
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(used.len(), held.iter().map(Vec::len).sum::<usize>());
                prop_assert_eq!(pages.free() + used.len(), pages.total());
            }
        }
    }
}
