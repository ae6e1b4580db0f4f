//! Doubly linked lists of blocks, each block in one of them at most.

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Ends {
    first: u32,
    last: u32,
    len: usize,
}

/// Lists numbered from 0; the first of a list is its oldest.
#[derive(Debug)]
pub struct Lists {
    list: Vec<u8>,
    before: Vec<u32>,
    after: Vec<u32>,
    ends: Vec<Ends>,
}

impl Lists {
    /// So many empty lists for so many blocks.
    pub fn new(lists: usize, blocks: usize) -> Lists {
        Lists {
            list: vec![u8::MAX; blocks],
            before: vec![NONE; blocks],
            after: vec![NONE; blocks],
            ends: vec![
                Ends {
                    first: NONE,
                    last: NONE,
                    len: 0
                };
                lists
            ],
        }
    }

    /// The list that a block is in.
    pub fn of(&self, block: u32) -> Option<usize> {
        let list = self.list[block as usize];
        (list != u8::MAX).then_some(usize::from(list))
    }

    /// How long a list is.
    pub fn len(&self, list: usize) -> usize {
        self.ends[list].len
    }

    /// The oldest of a list.
    pub fn first(&self, list: usize) -> Option<u32> {
        Some(self.ends[list].first).filter(|block| *block != NONE)
    }

    /// The next younger one in the same list.
    pub fn after(&self, block: u32) -> Option<u32> {
        Some(self.after[block as usize]).filter(|block| *block != NONE)
    }

    /// Puts a block at the young end of a list, out of the one that it was in.
    pub fn push(&mut self, list: usize, block: u32) {
        self.remove(block);
        let ends = &mut self.ends[list];
        self.before[block as usize] = ends.last;
        self.after[block as usize] = NONE;
        match ends.last {
            NONE => ends.first = block,
            last => self.after[last as usize] = block,
        }
        ends.last = block;
        ends.len += 1;
        self.list[block as usize] = list as u8;
    }

    /// Takes a block out of its list.
    pub fn remove(&mut self, block: u32) {
        let Some(list) = self.of(block) else { return };
        let (before, after) = (self.before[block as usize], self.after[block as usize]);
        let ends = &mut self.ends[list];
        match before {
            NONE => ends.first = after,
            before => self.after[before as usize] = after,
        }
        match after {
            NONE => ends.last = before,
            after => self.before[after as usize] = before,
        }
        ends.len -= 1;
        self.list[block as usize] = u8::MAX;
    }

    /// Takes the oldest of a list out.
    pub fn pop(&mut self, list: usize) -> Option<u32> {
        let block = self.first(list)?;
        self.remove(block);
        Some(block)
    }
}
