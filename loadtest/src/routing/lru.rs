//! A set with a bound that forgets what was used longest ago: the lower tiers of an engine, a router's history.

use std::hash::Hash;

use foldhash::HashMap;

const NONE: u32 = u32::MAX;

/// Keys with values, least recently used first out.
#[derive(Clone, Debug)]
pub struct Lru<K, V = ()> {
    capacity: usize,
    known: HashMap<K, u32>,
    entries: Vec<Entry<K, V>>,
    /// Used longest ago, used last.
    ends: [u32; 2],
    unused: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Entry<K, V> {
    key: K,
    value: V,
    before: u32,
    after: u32,
}

// === impl Lru ===

impl<K: Copy + Eq + Hash, V> Lru<K, V> {
    /// An empty one for so many keys; of 0, every key is forgotten at once.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, known: HashMap::default(), entries: Vec::new(), ends: [NONE; 2], unused: Vec::new() }
    }

    /// How many keys are in it.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whether the key is in it. It does not count as used.
    pub fn contains(&self, key: K) -> bool {
        self.known.contains_key(&key)
    }

    /// The value, which does not count as used.
    pub fn get_mut(&mut self, key: K) -> Option<&mut V> {
        let at = *self.known.get(&key)?;
        Some(&mut self.entries[at as usize].value)
    }

    /// Counts the key as used now, if it is in it. Says whether it is.
    pub fn touch(&mut self, key: K) -> bool {
        let Some(&at) = self.known.get(&key) else { return false };
        self.unlink(at);
        self.push(at);
        true
    }

    /// Puts the key in as used now. Returns the key that had to go, which is this one if there is no room at all.
    pub fn insert(&mut self, key: K, value: V) -> Option<(K, V)> {
        if let Some(&at) = self.known.get(&key) {
            self.entries[at as usize].value = value;
            self.touch(key);
            return None;
        }
        if self.capacity == 0 {
            return Some((key, value));
        }
        let entry = Entry { key, value, before: NONE, after: NONE };
        if self.known.len() == self.capacity {
            let at = self.ends[0];
            self.unlink(at);
            let gone = std::mem::replace(&mut self.entries[at as usize], entry);
            self.known.remove(&gone.key);
            self.known.insert(key, at);
            self.push(at);
            return Some((gone.key, gone.value));
        }
        let at = if let Some(at) = self.unused.pop() {
            self.entries[at as usize] = entry;
            at
        } else {
            self.entries.push(entry);
            self.entries.len() as u32 - 1
        };
        self.known.insert(key, at);
        self.push(at);
        None
    }

    /// Takes the key out. Says whether it was in it.
    pub fn remove(&mut self, key: K) -> bool {
        let Some(at) = self.known.remove(&key) else { return false };
        self.unlink(at);
        self.unused.push(at);
        true
    }

    fn unlink(&mut self, at: u32) {
        let Entry { before, after, .. } = self.entries[at as usize];
        match before {
            NONE => self.ends[0] = after,
            before => self.entries[before as usize].after = after,
        }
        match after {
            NONE => self.ends[1] = before,
            after => self.entries[after as usize].before = before,
        }
    }

    fn push(&mut self, at: u32) {
        let last = self.ends[1];
        (self.entries[at as usize].before, self.entries[at as usize].after) = (last, NONE);
        match last {
            NONE => self.ends[0] = at,
            last => self.entries[last as usize].after = at,
        }
        self.ends[1] = at;
    }
}

#[cfg(test)]
#[path = "lru_tests.rs"]
mod tests;
