//! Where instances and pools stand, and so what kind of link lies between two of them. Pure: names in, classes out.
//!
//! A place has four labels, from narrow to wide: island (accelerators with a link of their own, such as NVLink), node,
//! rack, zone. Two places are joined by the narrowest label that both have and that is equal. A label that is not known
//! equals no other.

use serde::Deserialize;

use crate::pattern::specificity;

/// Most entries of `[[topology.place]]` that a document may hold: each instance is compared with each of them.
pub const MAX_PLACES: usize = 4_096;

/// The narrowest thing that two places share. The order is from narrow to wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum LinkClass {
    /// Accelerators with a direct link.
    Island = 0,
    /// One machine.
    Node = 1,
    /// One rack or one switch.
    Rack = 2,
    /// One zone or data centre.
    Zone = 3,
    /// Nothing that is known.
    Other = 4,
}

/// Where something stands, as labels in the form that is compared. 0: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Location {
    /// By [`LinkClass`], without [`LinkClass::Other`].
    labels: [u64; 4],
}

/// Where something stands, as written in a document. Absent: the topology's default label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Labels {
    /// Accelerators with a direct link.
    pub island: Option<String>,
    /// Machine. Absent: the host part of the instance's name, if it has one.
    pub node: Option<String>,
    /// Rack.
    pub rack: Option<String>,
    /// Zone.
    pub zone: Option<String>,
}

/// Instances whose names match have these labels.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Instance names, `*` for any characters. If several places match, the one with the most other characters counts.
    pub instances: String,
    /// Where they stand.
    #[serde(default)]
    pub labels: Labels,
    /// Name of their engine profile. Absent: the question's.
    pub profile: Option<String>,
}

/// A shared store.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Name, as the index says it (`pool:NAME`).
    pub name: String,
    /// Where it stands.
    #[serde(default)]
    pub labels: Labels,
    /// Start-up time of a read, ms. Absent: the tier's.
    pub alpha_ms: Option<f64>,
    /// Read speed, GB/s. Absent: the tier's.
    pub gb_per_s: Option<f64>,
}

/// Who stands where.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Labels of everybody who has no other.
    #[serde(default)]
    pub default: Labels,
    /// Places by name.
    #[serde(default, rename = "place")]
    pub places: Vec<Place>,
    /// Shared stores.
    #[serde(default, rename = "pool")]
    pub pools: Vec<Pool>,
}

// === impl LinkClass ===

impl LinkClass {
    /// All classes, narrow to wide.
    pub const ALL: [Self; 5] = [Self::Island, Self::Node, Self::Rack, Self::Zone, Self::Other];

    /// Lower-case name, as used in documents and answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Island => "island",
            Self::Node => "node",
            Self::Rack => "rack",
            Self::Zone => "zone",
            Self::Other => "other",
        }
    }

    /// Whether bytes pass through the network port of an instance.
    pub fn uses_port(self) -> bool {
        self >= Self::Rack
    }
}

// === impl Location ===

impl Location {
    /// The location with these labels; `None` is not known.
    pub fn new(island: Option<&str>, node: Option<&str>, rack: Option<&str>, zone: Option<&str>) -> Self {
        Self { labels: [island, node, rack, zone].map(|label| label.map_or(0, label_hash)) }
    }

    /// What lies between here and there.
    pub fn link_to(self, other: Self) -> LinkClass {
        let shared = (0..4).find(|&at| self.labels[at] != 0 && self.labels[at] == other.labels[at]);
        LinkClass::ALL[shared.unwrap_or(4)]
    }

    /// Whether nothing at all is known of the place.
    pub fn is_unknown(self) -> bool {
        self.labels == [0; 4]
    }

    /// The label of this class, 0 where it is not known.
    pub(crate) fn label(self, class: LinkClass) -> u64 {
        self.labels.get(class as usize).copied().unwrap_or(0)
    }
}

/// FNV-1a: a label is compared millions of times and printed never. 64 bits of a few thousand labels do not collide in
/// practice, and if they did a link would be taken for a faster one.
fn label_hash(label: &str) -> u64 {
    let hash = label
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    hash.max(1)
}

// === impl Topology ===

impl Topology {
    /// Where the instance stands.
    pub fn locate(&self, instance: &str) -> Location {
        let place = self.place_of(instance);
        self.location(place.map(|place| &place.labels), host_of(instance))
    }

    /// Where the pool stands. Unlike an instance it has no host of its own.
    pub fn locate_pool(&self, name: &str) -> Location {
        self.location(self.pool(name).map(|pool| &pool.labels), None)
    }

    /// The pool with this name.
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == name)
    }

    /// The place that says the most about the instance.
    pub fn place_of(&self, instance: &str) -> Option<&Place> {
        let matching = self.places.iter().filter_map(|p| Some((specificity(&p.instances, instance)?, p)));
        // The first of equals, so that the answer does not depend on how the search goes.
        matching.rev().max_by_key(|(characters, _)| *characters).map(|(_, place)| place)
    }

    fn location(&self, labels: Option<&Labels>, host: Option<&str>) -> Location {
        let own = |pick: fn(&Labels) -> &Option<String>| {
            labels.and_then(|l| pick(l).as_deref()).or(pick(&self.default).as_deref())
        };
        Location::new(own(|l| &l.island), own(|l| &l.node).or(host), own(|l| &l.rack), own(|l| &l.zone))
    }
}

/// `10.0.0.7` of `10.0.0.7:8000`; a name without a port is no host.
fn host_of(instance: &str) -> Option<&str> {
    let (host, port) = instance.rsplit_once(':')?;
    (!host.is_empty() && !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology() -> Topology {
        toml::from_str(
            r#"
            default = { zone = "z1" }
            place = [
              { instances = "10.0.1.*", labels = { rack = "r1" } },
              { instances = "10.0.1.9:*", labels = { rack = "r2", zone = "z2" } },
            ]
            pool = [{ name = "pool:lmcache", labels = { rack = "r1" } }]
            "#,
        )
        .unwrap()
    }

    #[test]
    fn two_places_are_joined_by_the_narrowest_label_they_share() {
        let t = topology();
        let link = |a: &str, b: &str| t.locate(a).link_to(t.locate(b));
        assert_eq!(link("10.0.1.1:8000", "10.0.1.1:8001"), LinkClass::Node);
        assert_eq!(link("10.0.1.1:8000", "10.0.1.2:8000"), LinkClass::Rack);
        assert_eq!(link("10.0.1.1:8000", "10.0.2.1:8000"), LinkClass::Zone);
        assert_eq!(link("10.0.1.1:8000", "10.0.1.9:8000"), LinkClass::Other);
        assert_eq!(t.locate_pool("pool:lmcache").link_to(t.locate("10.0.1.3:1")), LinkClass::Rack);
    }

    #[test]
    fn an_unknown_label_equals_no_other() {
        assert_eq!(Location::default().link_to(Location::default()), LinkClass::Other);
        assert!(Topology::default().locate("pod-a").is_unknown());
    }
}
