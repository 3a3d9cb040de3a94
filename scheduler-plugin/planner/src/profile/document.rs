//! Profile documents: TOML in, checked profiles out. Nothing is half accepted: a document with a mistake changes nothing.

use std::sync::Arc;

use serde::Deserialize;

use super::{EngineProfile, GroupKind, LinkSpeeds, ModelProfile, Profiles, TierSpeeds};
use crate::topology::{LinkClass, MAX_PLACES, Topology};

/// Most models and most engines that are kept, each: every question's model is compared with all their patterns.
pub const MAX_PROFILES: usize = 1_024;

const MODELS: &str = include_str!("../../profiles/models.toml");
const ENGINES: &str = include_str!("../../profiles/engines.toml");
const LINKS: &str = include_str!("../../profiles/links.toml");

/// A profile document cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It is not TOML, or a field is unknown, missing or of another type.
    #[error("{document}: {source}")]
    Parse {
        /// Name of the document.
        document: String,
        /// What is wrong where, and what is allowed.
        source: Box<toml::de::Error>,
    },
    /// A number is out of range.
    #[error("{document}: {what} is {value}: give {allowed}")]
    Range {
        /// Name of the document.
        document: String,
        /// Which number of which profile.
        what: String,
        /// What was given.
        value: f64,
        /// What is allowed.
        allowed: &'static str,
    },
    /// A wider link class is faster than a narrower one.
    #[error(
        "{document}: links.{wide} is faster or quicker to start than links.{narrow}: a wider class must not be, so give \
         it at most the same gb_per_s and at least the same alpha_ms"
    )]
    LinkOrder {
        /// Name of the document.
        document: String,
        /// The narrower class.
        narrow: &'static str,
        /// The wider class.
        wide: &'static str,
    },
    /// A model was measured that nobody describes.
    #[error(
        "{document}: engine {engine:?} was measured with model {model:?}, which has no [[model]]: add it"
    )]
    UnknownModel {
        /// Name of the document.
        document: String,
        /// Which engine.
        engine: String,
        /// Which model.
        model: String,
    },
    /// There are too many.
    #[error("{document}: there would be {count} {what}: keep at most {most}")]
    TooMany {
        /// Name of the document.
        document: String,
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many may be.
        most: usize,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default, rename = "model")]
    models: Vec<ModelProfile>,
    #[serde(default, rename = "engine")]
    engines: Vec<EngineProfile>,
    tiers: Option<TierSpeeds>,
    links: Option<LinkSpeeds>,
    topology: Option<Topology>,
}

/// Names a document in what is said about it.
struct Checks<'a> {
    document: &'a str,
}

// === impl Profiles ===

impl Profiles {
    /// What is shipped: sizes of common models, measured engines, speeds of common links.
    pub fn shipped() -> Self {
        #[derive(Deserialize)]
        struct Speeds {
            tiers: TierSpeeds,
            links: LinkSpeeds,
        }
        let Speeds { tiers, links } = toml::from_str(LINKS).expect("shipped speeds parse, as a test says");
        let mut shipped = Self {
            models: Vec::new(),
            engines: Vec::new(),
            tiers,
            links,
            topology: Topology::default(),
            speeds_configured: false,
        };
        for (name, text) in [("models.toml", MODELS), ("engines.toml", ENGINES)] {
            shipped.extend(name, text).expect("shipped profiles are right, as a test says");
        }
        shipped
    }

    /// Adds a document; what it names replaces what has the same name. `document` names it in errors.
    pub fn extend(&mut self, document: &str, text: &str) -> Result<(), ProfileError> {
        let parsed: Document = toml::from_str(text).map_err(|source| ProfileError::Parse {
            document: document.to_owned(),
            source: Box::new(source),
        })?;
        let mut next = self.clone();
        for model in parsed.models {
            next.models.retain(|known| known.name != model.name);
            next.models.push(Arc::new(model));
        }
        for engine in parsed.engines {
            next.engines.retain(|known| known.name != engine.name);
            next.engines.push(Arc::new(engine));
        }
        next.speeds_configured |= parsed.tiers.is_some() || parsed.links.is_some();
        next.tiers = parsed.tiers.unwrap_or(next.tiers);
        next.links = parsed.links.unwrap_or(next.links);
        next.topology = parsed.topology.unwrap_or(next.topology);
        next.check(&Checks { document })?;
        *self = next;
        Ok(())
    }

    fn check(&self, checks: &Checks<'_>) -> Result<(), ProfileError> {
        checks.most("models", self.models.len(), MAX_PROFILES)?;
        checks.most("engines", self.engines.len(), MAX_PROFILES)?;
        checks.most("places", self.topology.places.len(), MAX_PLACES)?;
        for model in &self.models {
            checks.model(model)?;
        }
        for engine in &self.engines {
            checks.engine(engine)?;
            if let Some(model) = &engine.measured_model
                && !self.models.iter().any(|known| known.name == *model)
            {
                return Err(ProfileError::UnknownModel {
                    document: checks.document.to_owned(),
                    engine: engine.name.clone(),
                    model: model.clone(),
                });
            }
        }
        checks.speeds(&self.tiers, &self.links)?;
        for pool in &self.topology.pools {
            checks.at_least_0(&format!("pool {}: alpha_ms", pool.name), pool.alpha_ms.unwrap_or(0.0))?;
            checks.at_least_0(&format!("pool {}: gb_per_s", pool.name), pool.gb_per_s.unwrap_or(0.0))?;
        }
        Ok(())
    }
}

// === impl Checks ===

impl Checks<'_> {
    fn most(&self, what: &'static str, count: usize, most: usize) -> Result<(), ProfileError> {
        if count > most {
            return Err(ProfileError::TooMany { document: self.document.to_owned(), what, count, most });
        }
        Ok(())
    }

    fn range(&self, what: &str, value: f64, ok: bool, allowed: &'static str) -> Result<(), ProfileError> {
        if ok {
            return Ok(());
        }
        Err(ProfileError::Range { document: self.document.to_owned(), what: what.to_owned(), value, allowed })
    }

    fn at_least_0(&self, what: &str, value: f64) -> Result<(), ProfileError> {
        self.range(what, value, value >= 0.0 && value.is_finite(), "a finite number of at least 0")
    }

    fn above_0(&self, what: &str, value: f64) -> Result<(), ProfileError> {
        self.range(what, value, value > 0.0 && value.is_finite(), "a finite number above 0")
    }

    fn model(&self, model: &ModelProfile) -> Result<(), ProfileError> {
        let name = &model.name;
        self.above_0(&format!("model {name}: layers"), f64::from(model.layers))?;
        self.above_0(&format!("model {name}: kv_heads"), f64::from(model.kv_heads))?;
        self.above_0(&format!("model {name}: query_width"), f64::from(model.query_width))?;
        self.above_0(&format!("model {name}: active_params_b"), model.active_params_b)?;
        self.above_0(&format!("model {name}: number of groups"), model.groups.len() as f64)?;
        for (at, group) in model.groups.iter().enumerate() {
            let what = |field: &str| format!("model {name}: group {at}: {field}");
            match group.kind {
                GroupKind::Full => self.above_0(&what("bytes_per_token"), group.bytes_per_token)?,
                GroupKind::Window => {
                    self.above_0(&what("bytes_per_token"), group.bytes_per_token)?;
                    self.above_0(&what("window_tokens"), f64::from(group.window_tokens))?;
                }
                GroupKind::State => self.above_0(&what("state_bytes"), group.state_bytes)?,
            }
        }
        Ok(())
    }

    fn engine(&self, engine: &EngineProfile) -> Result<(), ProfileError> {
        for (field, value) in [
            ("prefill.c0_ms", engine.prefill.c0_ms),
            ("prefill.c1_ms_per_token", engine.prefill.c1_ms_per_token),
            ("prefill.c2_ms_per_token2", engine.prefill.c2_ms_per_token2),
            ("decode.base_ms", engine.decode.base_ms),
            ("decode.per_request_ms", engine.decode.per_request_ms),
            ("gamma", engine.gamma),
            ("port_gb_per_s", engine.port_gb_per_s),
            ("detect_ms", engine.detect_ms),
        ] {
            self.at_least_0(&format!("engine {}: {field}", engine.name), value)?;
        }
        for (field, value) in [
            ("tensor_parallel", engine.tensor_parallel),
            ("max_running", engine.max_running),
            ("chunk_tokens", engine.chunk_tokens),
        ] {
            self.above_0(&format!("engine {}: {field}", engine.name), f64::from(value))?;
        }
        Ok(())
    }

    fn speeds(&self, tiers: &TierSpeeds, links: &LinkSpeeds) -> Result<(), ProfileError> {
        for (name, tier) in
            [("gpu", &tiers.gpu), ("cpu", &tiers.cpu), ("ssd", &tiers.ssd), ("remote", &tiers.remote)]
        {
            self.at_least_0(&format!("tiers.{name}.alpha_ms"), tier.alpha_ms)?;
            self.at_least_0(&format!("tiers.{name}.gb_per_s"), tier.gb_per_s)?;
            self.range(&format!("tiers.{name}.tau_s"), tier.tau_s, tier.tau_s > 0.0, "a number above 0")?;
        }
        for class in LinkClass::ALL {
            let link = links.of(class);
            self.at_least_0(&format!("links.{}.alpha_ms", class.name()), link.alpha_ms)?;
            self.at_least_0(&format!("links.{}.gb_per_s", class.name()), link.gb_per_s)?;
        }
        for pair in LinkClass::ALL.windows(2) {
            let (narrow, wide) = (links.of(pair[0]), links.of(pair[1]));
            if wide.gb_per_s > narrow.gb_per_s || wide.alpha_ms < narrow.alpha_ms {
                return Err(ProfileError::LinkOrder {
                    document: self.document.to_owned(),
                    narrow: pair[0].name(),
                    wide: pair[1].name(),
                });
            }
        }
        Ok(())
    }
}
