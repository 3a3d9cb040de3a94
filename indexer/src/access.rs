//! Opens what protects the gRPC port, TLS and the table of callers, and keeps both as their files say.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::auth::AuthTable;
use crate::guard::Gate;
use crate::metrics::Metrics;
use crate::tls::{CurrentTls, TlsFiles};
use crate::watched::{Watched, WatchedFileError};

/// What protects the port.
pub(crate) struct Access {
    pub(crate) tls: Option<CurrentTls>,
    pub(crate) gate: Arc<Gate>,
    knows_callers: bool,
}

// === impl Access ===

impl Access {
    /// Reads the files, and again whenever they change, until `stop`.
    pub(crate) fn open(
        tls: Option<&TlsFiles>,
        auth_file: Option<PathBuf>,
        metrics: &Arc<Metrics>,
        stop: &CancellationToken,
        tasks: &mut JoinSet<()>,
    ) -> Result<Self, WatchedFileError> {
        let mut keep = Keep { metrics, stop, tasks };
        let tls = match tls {
            None => None,
            Some(files) => {
                let (watched, current) = files.open()?;
                let replaced = current.clone();
                keep.current("tls", watched, move |tls| replaced.replace(tls));
                Some(current)
            }
        };
        let knows_callers = auth_file.is_some();
        let gate = match auth_file {
            None => Arc::new(Gate::new(None, Arc::clone(metrics))),
            Some(path) => {
                let (watched, table) = Watched::open("auth file", vec![path], auth_table)?;
                tracing::info!(identities = table.len(), "callers of the gRPC port have to be known");
                let gate = Arc::new(Gate::new(Some(table), Arc::clone(metrics)));
                let replaced = Arc::clone(&gate);
                keep.current("auth", watched, move |table| replaced.replace(table));
                gate
            }
        };
        Ok(Self { tls, gate, knows_callers })
    }

    /// Being open is the default on one machine and a decision beyond it.
    pub(crate) fn warn_if_open(&self, address: SocketAddr) {
        if address.ip().is_loopback() {
            return;
        }
        if !self.knows_callers {
            tracing::warn!(
                %address,
                "everybody who reaches the gRPC port may ask about every tenant: give --auth-file, or let a network \
                 policy decide who reaches it"
            );
        }
        if self.tls.is_none() {
            tracing::warn!(
                %address,
                "the gRPC port is not encrypted: prompts and tokens can be read on the way; give --tls-cert-file and \
                 --tls-key-file, or keep it inside an encrypted network"
            );
        }
    }
}

/// Keeps in force what watched files say, and counts what became of them.
pub(crate) struct Keep<'a> {
    pub(crate) metrics: &'a Arc<Metrics>,
    pub(crate) stop: &'a CancellationToken,
    pub(crate) tasks: &'a mut JoinSet<()>,
}

// === impl Keep ===

impl Keep<'_> {
    pub(crate) fn current<T: Send + 'static>(
        &mut self,
        what: &'static str,
        watched: Watched<T>,
        put_in_force: impl Fn(T) + Send + 'static,
    ) {
        let metrics = Arc::clone(self.metrics);
        let take = move |read: Result<T, WatchedFileError>| {
            metrics.count_reload(what, read.is_ok());
            // What is wrong was logged where it was found.
            if let Ok(value) = read {
                put_in_force(value);
            }
        };
        self.tasks.spawn(watched.keep(take, self.stop.clone()));
    }
}

fn auth_table(contents: &[Vec<u8>]) -> Result<AuthTable, String> {
    let [text] = contents else { unreachable!("one path is watched") };
    let text = std::str::from_utf8(text).map_err(|_| "it is not text".to_owned())?;
    AuthTable::parse(text).map_err(|error| error.to_string())
}
