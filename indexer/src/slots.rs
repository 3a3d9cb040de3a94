//! A list with holes: values have a small, dense number that stays theirs until it is given back.

/// Values by number; freed numbers are reused, latest first.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

// === impl Slots ===

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { items: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    /// Stores a value and gives it a number.
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        if let Some(at) = self.free.pop() {
            self.items[at as usize] = Some(value);
            return at;
        }
        self.items.push(Some(value));
        self.items.len() as u32 - 1
    }

    /// Takes the value out. Its number is not reused before [`Self::recycle`].
    pub(crate) fn take(&mut self, at: u32) -> Option<T> {
        self.items.get_mut(at as usize)?.take()
    }

    /// Allows the number of a taken value to be used again.
    pub(crate) fn recycle(&mut self, at: u32) {
        debug_assert!(self.items[at as usize].is_none() && !self.free.contains(&at));
        self.free.push(at);
    }

    pub(crate) fn get(&self, at: u32) -> Option<&T> {
        self.items.get(at as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, at: u32) -> Option<&mut T> {
        self.items.get_mut(at as usize)?.as_mut()
    }

    /// True if the next value gets a number that was used before.
    pub(crate) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Numbers in use or reserved are below this.
    pub(crate) fn bound(&self) -> usize {
        self.items.len()
    }
}
