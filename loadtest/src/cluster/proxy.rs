//! A TCP relay on loopback that can be shut: the cable between two processes.
//!
//! Shutting it ends every connection through it at once and refuses new ones until it is opened again. Both ends notice at
//! once, as they do when a peer's host says that nobody is there. A peer that says nothing any more is another fault: see
//! [`Process::freeze`](crate::recovery::processes::Process::freeze).

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Connections at a time: those of a rig, many times over. At the bound a new one is refused.
const MAX_CONNECTIONS: usize = 512;

/// One relay; gone with its owner.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    open: watch::Sender<bool>,
    _stop: DropGuard,
}

// === impl Proxy ===

impl Proxy {
    /// Relays to `target` from a free port.
    pub async fn start(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (open, is_open) = watch::channel(true);
        let stop = CancellationToken::new();
        tokio::spawn(accept(listener, target, is_open, stop.clone()));
        Ok(Self { address, open, _stop: stop.drop_guard() })
    }

    /// Where to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts, or joins again.
    pub fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }
}

async fn accept(
    listener: TcpListener,
    target: SocketAddr,
    open: watch::Receiver<bool>,
    stop: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Aborted with the set.
    let mut relays = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            _ = relays.join_next(), if !relays.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        let Ok((near, _)) = accepted else { continue };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
        if *open.borrow() {
            let open = open.clone();
            relays.spawn(async move {
                relay(near, target, open).await;
                drop(permit);
            });
        }
    }
}

/// Until either side ends, or the relay is shut. Errors are the ends' own business.
async fn relay(mut near: TcpStream, target: SocketAddr, mut open: watch::Receiver<bool>) {
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
        _ = open.wait_for(|open| !open) => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        address
    }

    async fn says(stream: &mut TcpStream) -> bool {
        let mut answer = [0; 1];
        stream.write_all(b"x").await.is_ok() && stream.read_exact(&mut answer).await.is_ok()
    }

    #[tokio::test]
    async fn what_is_shut_ends_at_once_and_nothing_new_gets_through_until_it_is_opened() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut before = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(says(&mut before).await);
        proxy.set_open(false);
        assert!(!says(&mut before).await);
        if let Ok(mut meanwhile) = TcpStream::connect(proxy.address()).await {
            assert!(!says(&mut meanwhile).await);
        }
        proxy.set_open(true);
        assert!(says(&mut TcpStream::connect(proxy.address()).await.unwrap()).await);
    }
}
