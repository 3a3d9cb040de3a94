//! Engine pages that are smaller or larger than the scope's block: events are rewritten to the scope's blocks before the
//! mirror sees them.
//!
//! * **Larger** (an engine block is k scope blocks): each hash becomes k, the last of which keeps the engine's name, so that
//!   children still find their parent.
//! * **Smaller** (m pages are one scope block): a block is held in a place while all its pages are; it goes by the name of
//!   its last page. Pages at the end that do not fill a block are invisible.
//!
//! What cannot be told is left out and under-reports: a larger block with a multimodal item (events do not say how long
//! the item is, so which part it touches is unknown), a page under an unknown parent.
//!
//! Used only where the scope's block size is configured and differs from the engine's. Pure.

use std::collections::VecDeque;

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use smallvec::SmallVec;

mod saved;

use crate::event::{Batch, EngineHash, Event, Extra, ExtraValue, Removed, Span, Stored};

/// Most pages that are tracked at once, those held nowhere included; as many as the mirror tracks blocks.
const MAX_PAGES: usize = 16 << 20;
/// Most pages that are remembered although they are held nowhere.
const MAX_GHOST_PAGES: usize = 131_072;

/// Rewrites one engine rank's events.
pub struct Repager {
    /// Tokens per block of the scope.
    block: u32,
    out: Batch,
    media: Vec<Medium>,
    pages: HashMap<EngineHash, Page, FixedState>,
    ghosts: VecDeque<(EngineHash, u32)>,
    next_stamp: u32,
    untracked: u64,
}

/// A medium and cache group, and how its blocks relate to the scope's.
struct Medium {
    name: Box<[u8]>,
    remote: bool,
    group: Option<u16>,
    ratio: Ratio,
}

/// An engine's block beside the scope's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ratio {
    /// The same, or nothing is known yet.
    Same,
    /// This many scope blocks.
    Larger(u32),
    /// This many make a scope block.
    Smaller(u32),
    /// Neither divides the other.
    Unfit,
}

struct Page {
    /// Position in its block, from 0.
    position: u32,
    parent: Option<EngineHash>,
    tokens: Box<[u32]>,
    extras: Option<Vec<OwnedExtra>>,
    lora_name: Box<[u8]>,
    lora_id: Option<i64>,
    cache_salt: Box<[u8]>,
    /// Copies by medium number.
    copies: SmallVec<[(u8, u32); 2]>,
    /// Last pages of the blocks that this page is part of.
    blocks: SmallVec<[EngineHash; 1]>,
    /// For the last page of a block: all its pages in order.
    members: Box<[EngineHash]>,
    /// Names its latest turn in the ghost queue; 0 while held.
    ghost_stamp: u32,
}

/// An extra key, kept until its block is complete.
#[derive(Clone, PartialEq, Eq)]
enum OwnedExtra {
    Text(Box<[u8]>),
    Multimodal(Box<[u8]>, i64),
    Bytes(Box<[u8]>),
}

// === impl Repager ===

impl Repager {
    /// Rewrites to blocks of `block` tokens; not 0.
    pub fn new(block: u32) -> Self {
        Self {
            block,
            out: Batch::default(),
            media: Vec::new(),
            pages: HashMap::default(),
            ghosts: VecDeque::new(),
            next_stamp: 1,
            untracked: 0,
        }
    }

    /// Pages and blocks that could not be followed and do not count.
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// Forgets everything: another engine life, or a loss of events.
    pub fn reset(&mut self) {
        *self = Self { untracked: self.untracked, ..Self::new(self.block) };
    }

    /// The batch in scope blocks; `batch` itself where nothing differs.
    pub fn rewrite<'a>(&'a mut self, batch: &'a Batch) -> &'a Batch {
        let fits = |event: &Event| match event {
            Event::Stored(stored) => stored.block_size == 0 || stored.block_size == self.block,
            _ => true,
        };
        if self.media.is_empty() && batch.events.iter().all(fits) {
            return batch;
        }
        self.out.clear();
        for event in &batch.events {
            match event {
                Event::Stored(stored) => self.store(batch, stored),
                Event::Removed(removed) => self.remove(batch, removed),
                Event::Cleared => {
                    self.pages.clear();
                    self.ghosts.clear();
                    self.out.events.push(Event::Cleared);
                }
            }
        }
        &self.out
    }

    fn store(&mut self, batch: &Batch, event: &Stored) {
        // Further groups of a hybrid model have block sizes of their own, under the hashes of the first.
        if event.group.unwrap_or(0) != 0 {
            self.out.copy_event(batch, &Event::Stored(event.clone()));
            return;
        }
        let medium = self.medium(batch, &event.medium, event.remote, event.group);
        if event.block_size > 0 {
            self.media[usize::from(medium)].ratio = Ratio::of(event.block_size, self.block);
        }
        match self.media[usize::from(medium)].ratio {
            Ratio::Same | Ratio::Unfit => self.out.copy_event(batch, &Event::Stored(event.clone())),
            Ratio::Larger(parts) => self.store_parts(batch, event, parts),
            Ratio::Smaller(pages) => self.store_pages(batch, event, medium, pages),
        }
    }

    fn store_parts(&mut self, batch: &Batch, event: &Stored, parts: u32) {
        let hashes = batch.hashes(&event.hashes);
        let mut copy = self.out.copy_stored(batch, event);
        copy.hashes = self.out.push_hashes(hashes.iter().flat_map(|hash| parts_of(*hash, parts)));
        copy.block_size = event.block_size / parts;
        copy.lookahead = 0..0;
        let lora = batch.text(&event.lora_name);
        let mut known = event.lookahead.is_empty();
        copy.extras = event.extras.as_ref().map(|span| {
            let start = self.out.extras_end();
            for extra in batch.extras(span) {
                let ExtraValue::Text(text) = &extra.value else {
                    known = false;
                    continue;
                };
                // The adapter is on every part; a salt is on the prompt's first one. Anything else is an item.
                let is_lora = batch.text(text) == lora;
                let is_salt = extra.block == 0 && event.parent.is_none();
                known &= is_lora || is_salt;
                for part in 0..if is_lora { parts } else { 1 } {
                    let value = ExtraValue::Text(self.out.push_bytes(batch.bytes(text)));
                    self.out.push_extra(Extra { block: extra.block * parts + part, value });
                }
            }
            start..self.out.extras_end()
        });
        if !known {
            self.untracked += hashes.len() as u64;
            copy.tokens = 0..0;
        }
        self.out.events.push(Event::Stored(copy));
    }

    fn store_pages(&mut self, batch: &Batch, event: &Stored, medium: u8, pages: u32) {
        let hashes = batch.hashes(&event.hashes);
        let size = event.block_size as usize;
        let lines_up = size > 0 && event.tokens.len() == hashes.len() * size && event.lookahead.is_empty();
        let mut parent = event.parent;
        for (index, &hash) in hashes.iter().enumerate() {
            if self.pages.contains_key(&hash) {
                self.add_copy(hash, medium);
            } else {
                let position = match parent {
                    None => Some(0),
                    Some(parent) => self.pages.get(&parent).map(|page| (page.position + 1) % pages),
                };
                let (Some(position), true, true) = (position, lines_up, self.pages.len() < MAX_PAGES) else {
                    self.untracked += 1;
                    parent = Some(hash);
                    continue;
                };
                let tokens = batch.tokens(&event.tokens)[index * size..][..size].into();
                let page = Page::of(batch, event, index as u32, position, parent, tokens);
                self.insert(hash, page, pages);
                self.add_copy(hash, medium);
            }
            parent = Some(hash);
        }
    }

    /// Adds a page; if it is the last of its block, ties the block's pages together.
    fn insert(&mut self, hash: EngineHash, mut page: Page, pages: u32) {
        if page.position + 1 == pages {
            let mut members = vec![hash];
            let mut parent = page.parent;
            while let (true, Some(above)) = (members.len() < pages as usize, parent) {
                members.push(above);
                parent = self.pages.get(&above).and_then(|page| page.parent);
            }
            members.reverse();
            for member in &members[..members.len() - 1] {
                if let Some(member) = self.pages.get_mut(member) {
                    member.blocks.push(hash);
                }
            }
            page.blocks.push(hash);
            page.members = members.into();
        }
        self.pages.insert(hash, page);
    }

    fn add_copy(&mut self, hash: EngineHash, medium: u8) {
        let Some(page) = self.pages.get_mut(&hash) else { return };
        page.ghost_stamp = 0;
        if let Some((_, copies)) = page.copies.iter_mut().find(|(m, _)| *m == medium) {
            *copies = copies.saturating_add(1);
            return;
        }
        page.copies.push((medium, 1));
        for block in page.blocks.clone() {
            if self.is_complete(block, medium) {
                self.emit_stored(block, medium);
            }
        }
    }

    fn remove(&mut self, batch: &Batch, event: &Removed) {
        if event.group.unwrap_or(0) != 0 {
            self.out.copy_event(batch, &Event::Removed(event.clone()));
            return;
        }
        let medium = self.medium(batch, &event.medium, event.remote, event.group);
        match self.media[usize::from(medium)].ratio {
            Ratio::Same | Ratio::Unfit => self.out.copy_event(batch, &Event::Removed(event.clone())),
            Ratio::Larger(parts) => {
                let hashes = batch.hashes(&event.hashes).iter().flat_map(|hash| parts_of(*hash, parts));
                let hashes = self.out.push_hashes(hashes);
                let remaining: Vec<u32> = batch
                    .tokens(&event.remaining)
                    .iter()
                    .flat_map(|copies| std::iter::repeat_n(*copies, parts as usize))
                    .collect();
                let remaining = self.out.push_tokens(&remaining);
                let name = self.out.push_bytes(batch.bytes(&event.medium));
                self.out.events.push(Event::Removed(Removed {
                    hashes,
                    medium: name,
                    remaining,
                    ..event.clone()
                }));
            }
            Ratio::Smaller(_) => {
                for &hash in batch.hashes(&event.hashes) {
                    self.take_copy(hash, medium);
                }
            }
        }
    }

    fn take_copy(&mut self, hash: EngineHash, medium: u8) {
        let Some(page) = self.pages.get_mut(&hash) else { return };
        let Some(at) = page.copies.iter().position(|(m, _)| *m == medium) else { return };
        if page.copies[at].1 > 1 {
            page.copies[at].1 -= 1;
            return;
        }
        let blocks = page.blocks.clone();
        for block in blocks {
            if self.is_complete(block, medium) {
                self.emit_removed(block, medium);
            }
        }
        if let Some(page) = self.pages.get_mut(&hash) {
            page.copies.swap_remove(at);
            if page.copies.is_empty() {
                self.bury(hash);
            }
        }
    }

    /// Remembers a page that is held nowhere; forgets the oldest such page at the bound.
    fn bury(&mut self, hash: EngineHash) {
        let stamp = self.next_stamp;
        self.next_stamp = self.next_stamp.wrapping_add(1).max(1);
        let Some(page) = self.pages.get_mut(&hash) else { return };
        page.ghost_stamp = stamp;
        self.ghosts.push_back((hash, stamp));
        while self.ghosts.len() > MAX_GHOST_PAGES {
            let Some((oldest, stamp)) = self.ghosts.pop_front() else { return };
            if self.pages.get(&oldest).is_some_and(|page| page.ghost_stamp == stamp) {
                self.forget(oldest);
            }
        }
    }

    /// Forgets a page that is held nowhere, and the blocks that it was part of: they cannot be complete without it.
    fn forget(&mut self, hash: EngineHash) {
        let Some(page) = self.pages.remove(&hash) else { return };
        for block in page.blocks {
            let members = match self.pages.get_mut(&block) {
                Some(last) => std::mem::take(&mut last.members),
                None if block == hash => page.members.clone(),
                None => continue,
            };
            for member in &*members {
                if let Some(member) = self.pages.get_mut(member) {
                    member.blocks.retain(|other| *other != block);
                }
            }
        }
    }

    fn is_complete(&self, block: EngineHash, medium: u8) -> bool {
        let held = |hash: &EngineHash| {
            self.pages.get(hash).is_some_and(|page| page.copies.iter().any(|(m, _)| *m == medium))
        };
        self.pages.get(&block).is_some_and(|last| !last.members.is_empty() && last.members.iter().all(held))
    }

    fn emit_stored(&mut self, block: EngineHash, medium: u8) {
        let Some(last) = self.pages.get(&block) else { return };
        let Some(first) = last.members.first().and_then(|first| self.pages.get(first)) else { return };
        let (mut tokens, mut extras, mut listed) = (Vec::new(), Vec::new(), false);
        for page in last.members.iter().filter_map(|member| self.pages.get(member)) {
            let offset = i64::from(page.position) * page.tokens.len() as i64;
            tokens.extend_from_slice(&page.tokens);
            listed |= page.extras.is_some();
            for extra in page.extras.iter().flatten() {
                // An item over several pages is one item of the block, by its offset from the block's start.
                let extra = match extra {
                    OwnedExtra::Multimodal(id, from_page) => {
                        OwnedExtra::Multimodal(id.clone(), from_page + offset)
                    }
                    other => other.clone(),
                };
                if !extras.contains(&extra) {
                    extras.push(extra);
                }
            }
        }
        // The canonical order: adapter, items, salt, digests.
        extras.sort_by_key(|extra| match extra {
            OwnedExtra::Text(text) if **text == *first.lora_name => 0,
            OwnedExtra::Multimodal(..) => 1,
            OwnedExtra::Text(_) => 2,
            OwnedExtra::Bytes(_) => 3,
        });
        let out = &mut self.out;
        let hashes = out.push_hashes([block]);
        let start = out.extras_end();
        for extra in extras {
            let value = match extra {
                OwnedExtra::Text(text) => ExtraValue::Text(out.push_bytes(&text)),
                OwnedExtra::Multimodal(id, offset) => ExtraValue::Multimodal(out.push_bytes(&id), offset),
                OwnedExtra::Bytes(bytes) => ExtraValue::Bytes(out.push_bytes(&bytes)),
            };
            out.push_extra(Extra { block: 0, value });
        }
        let place = &self.media[usize::from(medium)];
        let stored = Stored {
            parent: first.parent,
            tokens: out.push_tokens(&tokens),
            block_size: self.block,
            medium: out.push_bytes(&place.name),
            remote: place.remote,
            group: place.group,
            lora_name: out.push_bytes(&first.lora_name),
            lora_id: first.lora_id,
            cache_salt: out.push_bytes(&first.cache_salt),
            extras: listed.then(|| start..out.extras_end()),
            ..Stored::of(hashes)
        };
        out.events.push(Event::Stored(stored));
    }

    fn emit_removed(&mut self, block: EngineHash, medium: u8) {
        let place = &self.media[usize::from(medium)];
        let hashes = self.out.push_hashes([block]);
        let name = self.out.push_bytes(&place.name);
        let (remote, group) = (place.remote, place.group);
        self.out.events.push(Event::Removed(Removed {
            hashes,
            medium: name,
            remote,
            group,
            remaining: 0..0,
        }));
    }

    /// The number of a medium and group; the last number is shared by all beyond it, which the mirror refuses anyway.
    fn medium(&mut self, batch: &Batch, name: &Span, remote: bool, group: Option<u16>) -> u8 {
        let name = batch.bytes(name);
        let same = |m: &Medium| m.remote == remote && m.group == group && m.name.eq_ignore_ascii_case(name);
        match self.media.iter().position(same) {
            Some(number) => number as u8,
            None if self.media.len() > usize::from(u8::MAX) => u8::MAX,
            None => {
                self.media.push(Medium { name: name.into(), remote, group, ratio: Ratio::Same });
                (self.media.len() - 1) as u8
            }
        }
    }
}

/// Names of the parts of an engine block; the last one is the engine's own.
fn parts_of(hash: EngineHash, parts: u32) -> impl Iterator<Item = EngineHash> {
    (0..parts).map(move |part| if part + 1 == parts { hash } else { hash.part(part) })
}

// === impl Ratio ===

impl Ratio {
    fn of(engine: u32, scope: u32) -> Self {
        match (engine, scope) {
            (engine, scope) if engine == scope => Self::Same,
            (engine, scope) if engine > scope && engine.is_multiple_of(scope) => Self::Larger(engine / scope),
            (engine, scope) if engine > 0 && scope.is_multiple_of(engine) => Self::Smaller(scope / engine),
            _ => Self::Unfit,
        }
    }
}

// === impl Page ===

impl Page {
    fn of(
        batch: &Batch,
        event: &Stored,
        index: u32,
        position: u32,
        parent: Option<EngineHash>,
        tokens: Box<[u32]>,
    ) -> Self {
        let extras = event.extras.as_ref().map(|span| {
            let own = batch.extras(span).iter().filter(|extra| extra.block == index);
            own.map(|extra| match &extra.value {
                ExtraValue::Text(text) => OwnedExtra::Text(batch.bytes(text).into()),
                ExtraValue::Multimodal(id, offset) => OwnedExtra::Multimodal(batch.bytes(id).into(), *offset),
                ExtraValue::Bytes(bytes) => OwnedExtra::Bytes(batch.bytes(bytes).into()),
            })
            .collect()
        });
        Self {
            position,
            parent,
            tokens,
            extras,
            lora_name: batch.bytes(&event.lora_name).into(),
            lora_id: event.lora_id,
            cache_salt: batch.bytes(&event.cache_salt).into(),
            copies: SmallVec::new(),
            blocks: SmallVec::new(),
            members: Box::default(),
            ghost_stamp: 0,
        }
    }
}
