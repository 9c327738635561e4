//! Tells the service manager how this process is: systemd's `sd_notify`, in its own few lines.
//!
//! The protocol is one datagram of `KEY=value` lines to the socket that `NOTIFY_SOCKET` names, and has not changed for
//! ten years; a crate would be longer than this. Without the variable nobody listens, and nothing is sent. `READY=1`
//! says that the process serves: not that its cluster has formed, or a first node could never be started before the
//! others.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// The way to the service manager; `None` inside when there is none.
pub struct Notifier(Option<UnixDatagram>);

impl Notifier {
    /// To the socket that the environment names.
    pub fn from_env() -> Notifier {
        Notifier::to(std::env::var_os("NOTIFY_SOCKET").as_deref())
    }

    fn to(socket: Option<&OsStr>) -> Notifier {
        let Some(socket) = socket.filter(|socket| !socket.is_empty()) else { return Notifier(None) };
        match connect(socket) {
            Ok(socket) => Notifier(Some(socket)),
            Err(error) => {
                tracing::warn!(%error, ?socket, "the service manager cannot be told anything");
                Notifier(None)
            }
        }
    }

    /// The process serves.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// It has begun to stop.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// What `systemctl status` shows; one line.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={text}"));
    }

    fn send(&self, message: &str) {
        let Some(socket) = &self.0 else { return };
        // Never waits: a manager that does not read must not hold up the node.
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::debug!(%error, message, "the service manager did not take a message");
        }
    }
}

fn connect(socket: &OsStr) -> io::Result<UnixDatagram> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let datagram = UnixDatagram::unbound()?;
    datagram.set_nonblocking(true)?;
    datagram.connect_addr(&address)?;
    Ok(datagram)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 256];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn every_message_arrives_at_a_path_and_at_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("stemedb-test-{}", std::process::id());
        let at_path = UnixDatagram::bind(&path).unwrap();
        let abstract_addr = SocketAddr::from_abstract_name(&name).unwrap();
        let at_name = UnixDatagram::bind_addr(&abstract_addr).unwrap();
        for (socket, to) in [(&at_path, path.into_os_string()), (&at_name, format!("@{name}").into())] {
            let notifier = Notifier::to(Some(&to));
            notifier.ready();
            notifier.status("leader in term 4");
            notifier.stopping();
            assert_eq!(received(socket), "READY=1");
            assert_eq!(received(socket), "STATUS=leader in term 4");
            assert_eq!(received(socket), "STOPPING=1");
        }
    }

    #[test]
    fn without_a_manager_nothing_is_sent_and_nothing_fails() {
        for to in [None, Some(OsStr::new("")), Some(OsStr::new("/nobody/listens/here"))] {
            Notifier::to(to).ready();
        }
    }
}
