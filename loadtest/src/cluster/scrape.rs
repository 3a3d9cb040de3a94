//! A server's metrics as numbers.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::recovery::processes::http_get;

/// Counters and gauges at one moment, labels added up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scrape(BTreeMap<String, f64>);

// === impl Scrape ===

impl Scrape {
    /// Those of the process whose HTTP port is at `address`; empty if it does not answer.
    pub async fn of(address: SocketAddr) -> Self {
        http_get(address, "/metrics").await.map_or_else(Self::default, |(_, text)| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut values = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let name = series.split('{').next().unwrap_or(series);
            *values.entry(name.to_owned()).or_insert(0.0) += value;
        }
        Self(values)
    }

    /// One of them; 0 if there is none of this name.
    pub fn get(&self, name: &str) -> f64 {
        self.0.get(name).copied().unwrap_or(0.0)
    }

    /// By how much it is more than it was.
    pub fn more(&self, earlier: &Self, name: &str) -> f64 {
        self.get(name) - earlier.get(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_added_up_and_what_is_not_there_is_nothing() {
        let text = "# HELP a x\na_total{r=\"x\"} 2\na_total{r=\"y\"} 3\nb 1.5\n# EOF\n";
        let scrape = Scrape::parse(text);
        assert_eq!((scrape.get("a_total"), scrape.get("b"), scrape.get("c")), (5.0, 1.5, 0.0));
        assert_eq!(scrape.more(&Scrape::default(), "b"), 1.5);
    }
}
