//! What a process, or a shim in this process, has to know to be part of a rig's deployment.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use kvatlas_bus::Bus;
use kvatlas_proto::Partition;
use kvatlas_proto::subject::Subjects;

use super::clock::Clock;

/// One deployment on this machine.
#[derive(Clone)]
pub struct Site {
    /// The `kvatlas` program.
    pub kvatlas: PathBuf,
    /// Where files may lie.
    pub folder: PathBuf,
    /// URLs of the brokers.
    pub brokers: Vec<String>,
    /// How the key space is cut.
    pub partition: Partition,
    /// Name of the deployment in what is said on the bus.
    pub prefix: &'static str,
    /// Subjects of that name.
    pub subjects: Subjects,
    /// The bus for shims in this process.
    pub bus: Arc<dyn Bus>,
    /// The clock by which everything is judged.
    pub clock: Clock,
}

// === impl Site ===

impl Site {
    /// The arguments that make a `kvatlas` process part of this deployment.
    pub fn deployment(&self) -> Vec<OsString> {
        let mut arguments = vec!["--subject-prefix".into(), self.prefix.into()];
        for broker in &self.brokers {
            arguments.extend(["--nats".into(), broker.into()]);
        }
        arguments.extend(["--shards".into(), self.partition.shards().to_string().into()]);
        arguments
    }
}
