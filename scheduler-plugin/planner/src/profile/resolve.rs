//! Which profile a model is priced with, and what is assumed where there is none.

use std::sync::Arc;

use super::{CostProfile, EngineProfile, FALLBACK_ENGINE, FALLBACK_MODEL, ModelProfile, Profiles};
use crate::pattern::specificity;

/// Most names that an error lists.
const NAMES_LISTED: usize = 20;

/// The question names a profile that nobody configured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("profile {name:?} is not known: name none to take the model's, or one of {}", known.join(", "))]
pub struct UnknownProfileError {
    /// What was asked for.
    pub name: String,
    /// What there is (the first 20).
    pub known: Vec<String>,
}

// === impl Profiles ===

impl Profiles {
    /// The engine profile with this name, as it was measured.
    pub fn engine(&self, name: &str) -> Option<&Arc<EngineProfile>> {
        self.engines.iter().find(|engine| engine.name == name)
    }

    /// The model profile with this name.
    pub fn model(&self, name: &str) -> Option<&Arc<ModelProfile>> {
        self.models.iter().find(|model| model.name == name)
    }

    /// The model profile whose pattern says the most about this model's name.
    pub fn model_for(&self, model: &str) -> Option<&Arc<ModelProfile>> {
        most_specific(&self.models, |profile| &profile.models, model)
    }

    /// What `model` costs on the engine profile called `profile`, or, if that is `None` or empty, on the one whose
    /// patterns fit the model, else on [`FALLBACK_ENGINE`].
    pub fn resolve(&self, model: &str, profile: Option<&str>) -> Result<CostProfile, UnknownProfileError> {
        let mut assumptions = Vec::new();
        let described = self.model_for(model).unwrap_or_else(|| {
            assumptions.push(format!(
                "No model profile fits {model:?}: KV sizes are those of {FALLBACK_MODEL}. Add a [[model]] for it."
            ));
            self.shipped_model(FALLBACK_MODEL)
        });
        let named = profile.filter(|name| !name.is_empty());
        let engine = match named {
            Some(name) => self.engine(name).ok_or_else(|| self.unknown(name))?,
            None => most_specific(&self.engines, |engine| &engine.models, model).unwrap_or_else(|| {
                assumptions.push(format!(
                    "No engine profile fits {model:?}: times are those of {FALLBACK_ENGINE}. Calibrate, and add an \
                     [[engine]] for it."
                ));
                self.engine(FALLBACK_ENGINE).expect("the shipped engine can be replaced, not removed")
            }),
        };
        let (engine, scaled) = self.fit(engine, described);
        assumptions.extend(scaled);
        if !self.speeds_configured {
            assumptions.push("Speeds of tiers and links are common ones, not measured here.".to_owned());
        }
        Ok(CostProfile {
            name: format!("{} on {}", described.name, engine.name),
            model: described.clone(),
            engine,
            tiers: self.tiers,
            links: self.links,
            assumptions,
        })
    }

    /// The engine called `name` for this model: for candidates that differ from the question's engine.
    pub fn engine_for(
        &self,
        name: &str,
        model: &ModelProfile,
    ) -> Result<Arc<EngineProfile>, UnknownProfileError> {
        let engine = self.engine(name).ok_or_else(|| self.unknown(name))?;
        Ok(self.fit(engine, model).0)
    }

    fn fit(&self, engine: &Arc<EngineProfile>, model: &ModelProfile) -> (Arc<EngineProfile>, Option<String>) {
        let measured = engine.measured_model.as_deref().filter(|name| *name != model.name);
        let Some(measured) = measured.and_then(|name| self.model(name)) else {
            return (engine.clone(), None);
        };
        let said = format!(
            "Engine profile {} was measured with {}: its times are scaled to {} by layers ({} to {}) and active \
             parameters ({} to {} billion).",
            engine.name,
            measured.name,
            model.name,
            measured.layers,
            model.layers,
            measured.active_params_b,
            model.active_params_b
        );
        (Arc::new(engine.scaled_to(model, measured)), Some(said))
    }

    fn shipped_model(&self, name: &str) -> &Arc<ModelProfile> {
        self.model(name).expect("a shipped model can be replaced, not removed")
    }

    fn unknown(&self, name: &str) -> UnknownProfileError {
        let known = self.engines.iter().map(|engine| engine.name.clone()).take(NAMES_LISTED).collect();
        UnknownProfileError { name: name.to_owned(), known }
    }
}

/// The last of equals: a later document says it again to change it.
fn most_specific<'a, T>(
    all: &'a [Arc<T>],
    patterns: impl Fn(&T) -> &[String],
    name: &str,
) -> Option<&'a Arc<T>> {
    let best_of = |item: &T| patterns(item).iter().filter_map(|pattern| specificity(pattern, name)).max();
    all.iter()
        .filter_map(|item| Some((best_of(item)?, item)))
        .max_by_key(|(best, _)| *best)
        .map(|(_, item)| item)
}
