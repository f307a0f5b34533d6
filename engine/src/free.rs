//! Places that are free.

/// Numbers below a limit that are free: those that came back, the last one first, and then those that nobody has had
/// yet. Of these nothing is written down, so that a big one takes no time to make.
#[derive(Debug)]
pub struct Free {
    back: Vec<u32>,
    fresh: u32,
    end: u32,
}

impl Free {
    /// All of them are.
    pub fn all(count: u32) -> Self {
        Self { back: Vec::with_capacity(count as usize), fresh: 0, end: count }
    }
    /// None of them is from now on.
    pub fn clear(&mut self) {
        self.back.clear();
        self.fresh = self.end;
    }
    /// How many are.
    pub fn len(&self) -> usize {
        self.back.len() + (self.end - self.fresh) as usize
    }
    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// One, which is not free any more.
    pub fn pop(&mut self) -> Option<u32> {
        let fresh = (self.fresh < self.end).then_some(self.fresh);
        let came_back = self.back.pop();
        self.fresh += u32::from(came_back.is_none() && fresh.is_some());
        came_back.or(fresh)
    }
    /// One that is free again.
    pub fn push(&mut self, place: u32) {
        debug_assert!(self.back.len() < self.back.capacity(), "no more than there are");
        self.back.push(place);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn each_is_given_out_once() {
        let mut free = Free::all(3);
        assert_eq!((free.pop(), free.pop(), free.len()), (Some(0), Some(1), 1));
        free.push(0);
        assert_eq!([free.pop(), free.pop(), free.pop(), free.pop()], [Some(0), Some(2), None, None]);
        assert!(free.is_empty());
        free.push(2);
        free.clear();
        assert_eq!((free.pop(), free.len()), (None, 0));
    }
}
