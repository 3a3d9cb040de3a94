//! A repager as a record, and back.

use kvatlas_proto::frame::MAX_FRAME_OWNERS;
use smallvec::SmallVec;

use super::{MAX_GHOST_PAGES, MAX_PAGES, Medium, OwnedExtra, Page, Ratio, Repager};
use crate::event::EngineHash;
use crate::state::{RestoreStateError, wire};

// === impl Repager ===

impl Repager {
    pub(crate) fn save(&self) -> wire::Repager {
        let is_buried = |(hash, stamp): &&(EngineHash, u32)| {
            self.pages.get(hash).is_some_and(|page| page.ghost_stamp == *stamp)
        };
        wire::Repager {
            media: self.media.iter().map(Medium::save).collect(),
            pages: self.pages.iter().map(|(hash, page)| page.save(*hash)).collect(),
            ghosts: self.ghosts.iter().filter(is_buried).map(|(hash, _)| hash.to_raw()).collect(),
        }
    }

    /// The repager of a saved record, for blocks of `block` tokens. Everything is checked.
    pub(crate) fn restore(block: u32, saved: &wire::ArchivedRepager) -> Result<Self, RestoreStateError> {
        let mut repager = Self::new(block);
        // One more than places are told apart by: the last number is shared.
        if saved.media.len() > MAX_FRAME_OWNERS {
            return Err(RestoreStateError::OverLimit { what: "media", max: MAX_FRAME_OWNERS });
        }
        if saved.pages.len() > MAX_PAGES {
            return Err(RestoreStateError::OverLimit { what: "pages", max: MAX_PAGES });
        }
        for medium in saved.media.iter() {
            repager.media.push(Medium::restore(medium, block)?);
        }
        for page in saved.pages.iter() {
            let hash = EngineHash::from_raw(page.hash.to_native());
            let page = Page::restore(page, block, repager.media.len())?;
            if repager.pages.insert(hash, page).is_some() {
                return Err(RestoreStateError::Inconsistent("a page is there twice"));
            }
        }
        repager.restore_ghosts(saved)?;
        Ok(repager)
    }

    fn restore_ghosts(&mut self, saved: &wire::ArchivedRepager) -> Result<(), RestoreStateError> {
        let held_nowhere = self.pages.values().filter(|page| page.copies.is_empty()).count();
        if saved.ghosts.len() != held_nowhere {
            return Err(RestoreStateError::Inconsistent("not every page that is held nowhere is a ghost"));
        }
        if held_nowhere > MAX_GHOST_PAGES {
            return Err(RestoreStateError::OverLimit { what: "ghost pages", max: MAX_GHOST_PAGES });
        }
        for raw in saved.ghosts.iter() {
            let hash = EngineHash::from_raw(raw.to_native());
            let unburied = |page: &Page| page.copies.is_empty() && page.ghost_stamp == 0;
            if !self.pages.get(&hash).is_some_and(unburied) {
                return Err(RestoreStateError::Inconsistent("a ghost page is held, or is not known"));
            }
            self.bury(hash);
        }
        Ok(())
    }
}

// === impl Medium ===

impl Medium {
    fn save(&self) -> wire::Medium {
        let (ratio, parts) = match self.ratio {
            Ratio::Same => (0, 0),
            Ratio::Larger(parts) => (1, parts),
            Ratio::Smaller(parts) => (2, parts),
            Ratio::Unfit => (3, 0),
        };
        wire::Medium { name: self.name.to_vec(), remote: self.remote, group: self.group, ratio, parts }
    }

    fn restore(saved: &wire::ArchivedMedium, block: u32) -> Result<Self, RestoreStateError> {
        let ratio = match (saved.ratio, saved.parts.to_native()) {
            (0, _) => Ratio::Same,
            (1, parts) if parts > 0 => Ratio::Larger(parts),
            (2, parts) if parts > 0 && block.is_multiple_of(parts) => Ratio::Smaller(parts),
            (3, _) => Ratio::Unfit,
            _ => return Err(RestoreStateError::Inconsistent("a medium's blocks do not make the scope's")),
        };
        Ok(Self {
            name: saved.name.as_slice().into(),
            remote: saved.remote,
            group: saved.group.as_ref().map(|group| group.to_native()),
            ratio,
        })
    }
}

// === impl Page ===

impl Page {
    fn save(&self, hash: EngineHash) -> wire::Page {
        let copies = |(place, copies): &(u8, u32)| wire::Copies { place: *place, copies: *copies };
        wire::Page {
            hash: hash.to_raw(),
            position: self.position,
            parent: self.parent.map(EngineHash::to_raw),
            tokens: self.tokens.to_vec(),
            extras: self.extras.as_ref().map(|extras| extras.iter().map(OwnedExtra::save).collect()),
            lora_name: self.lora_name.to_vec(),
            lora_id: self.lora_id,
            cache_salt: self.cache_salt.to_vec(),
            copies: self.copies.iter().map(copies).collect(),
            blocks: self.blocks.iter().map(|hash| hash.to_raw()).collect(),
            members: self.members.iter().map(|hash| hash.to_raw()).collect(),
        }
    }

    fn restore(saved: &wire::ArchivedPage, block: u32, media: usize) -> Result<Self, RestoreStateError> {
        if saved.position.to_native() >= block || saved.tokens.len() > block as usize {
            return Err(RestoreStateError::Inconsistent("a page is larger than its block"));
        }
        let mut copies = SmallVec::new();
        for count in saved.copies.iter() {
            let twice = copies.iter().any(|(medium, _)| *medium == count.place);
            if usize::from(count.place) >= media || count.copies == 0 || twice {
                return Err(RestoreStateError::Inconsistent("pages are nowhere, none, or counted twice"));
            }
            copies.push((count.place, count.copies.to_native()));
        }
        let extras = saved.extras.as_ref().map(|extras| extras.iter().map(OwnedExtra::restore).collect());
        Ok(Self {
            position: saved.position.to_native(),
            parent: saved.parent.as_ref().map(|parent| EngineHash::from_raw(parent.to_native())),
            tokens: saved.tokens.iter().map(|token| token.to_native()).collect(),
            extras: extras.transpose()?,
            lora_name: saved.lora_name.as_slice().into(),
            lora_id: saved.lora_id.as_ref().map(|id| id.to_native()),
            cache_salt: saved.cache_salt.as_slice().into(),
            copies,
            blocks: saved.blocks.iter().map(|hash| EngineHash::from_raw(hash.to_native())).collect(),
            members: saved.members.iter().map(|hash| EngineHash::from_raw(hash.to_native())).collect(),
            ghost_stamp: 0,
        })
    }
}

// === impl OwnedExtra ===

impl OwnedExtra {
    fn save(&self) -> wire::Extra {
        let (kind, value, offset) = match self {
            Self::Text(text) => (0, text, 0),
            Self::Multimodal(identifier, offset) => (1, identifier, *offset),
            Self::Bytes(bytes) => (2, bytes, 0),
        };
        wire::Extra { kind, value: value.to_vec(), offset }
    }

    fn restore(saved: &wire::ArchivedExtra) -> Result<Self, RestoreStateError> {
        let value: Box<[u8]> = saved.value.as_slice().into();
        match saved.kind {
            0 => Ok(Self::Text(value)),
            1 => Ok(Self::Multimodal(value, saved.offset.to_native())),
            2 => Ok(Self::Bytes(value)),
            _ => Err(RestoreStateError::Inconsistent("an extra key is of no known kind")),
        }
    }
}
