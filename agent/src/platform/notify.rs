//! Tells systemd how the process is: ready, alive, stopping (sd_notify(3)).
//!
//! A datagram to the socket that `NOTIFY_SOCKET` names; without one every call does nothing. Whether the
//! process is alive is not known here: [`crate::lifecycle`] asks its tasks.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The way to the service manager.
#[derive(Debug, Default)]
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// As the environment says: nowhere, if the process is no unit of type `notify`.
    ///
    /// # Errors
    /// When the socket that is named cannot be used: systemd would wait for a word that never comes.
    pub fn from_environment() -> io::Result<Self> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self::to(variable("NOTIFY_SOCKET"), variable("WATCHDOG_USEC"), variable("WATCHDOG_PID"))
    }

    fn to(
        socket: Option<OsString>,
        watchdog_usec: Option<OsString>,
        watchdog_pid: Option<OsString>,
    ) -> io::Result<Self> {
        let Some(name) = socket else { return Ok(Self::default()) };
        let bytes = name.as_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name)?,
            None => SocketAddr::from_pathname(OsStr::from_bytes(bytes))?,
        };
        let number = |text: OsString| text.to_str().and_then(|digits| digits.parse::<u64>().ok());
        // The watchdog may be meant for another process of the unit.
        let own = watchdog_pid.is_none_or(|pid| number(pid) == Some(u64::from(std::process::id())));
        let watchdog = watchdog_usec.and_then(number).filter(|usec| own && *usec > 0).map(Duration::from_micros);
        let socket = UnixDatagram::unbound()?;
        // A manager that is busy must not hold up the process.
        socket.set_nonblocking(true)?;
        Ok(Self { manager: Some((socket, address)), watchdog })
    }

    /// How long systemd waits for a sign of life before it ends the process. `None`: it does not.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// The service works.
    pub fn ready(&self) {
        self.say("READY=1");
    }

    /// The service is alive.
    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// The service has begun to stop.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    fn say(&self, word: &str) {
        let Some((socket, address)) = &self.manager else { return };
        // A manager that does not hear acts by its own timeouts, and there is nobody else to tell.
        if let Err(error) = socket.send_to_addr(word.as_bytes(), address) {
            tracing::warn!(event = "manager_not_told", word, error = %error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(manager: &UnixDatagram) -> String {
        let mut buffer = [0; 64];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    fn some(text: impl Into<OsString>) -> Option<OsString> {
        Some(text.into())
    }

    #[test]
    fn words_reach_a_socket_by_path_and_one_by_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("hestner-test-{}", std::process::id());
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        for (manager, address) in [(by_path, path.into_os_string()), (by_name, format!("@{name}").into())] {
            let notifier = Notifier::to(some(address), None, None).unwrap();
            notifier.ready();
            notifier.alive();
            notifier.stopping();
            assert_eq!([heard(&manager), heard(&manager), heard(&manager)], ["READY=1", "WATCHDOG=1", "STOPPING=1"]);
        }
    }

    #[test]
    fn watchdog_of_another_process_is_not_ours() {
        let watchdog = |pid: Option<OsString>| Notifier::to(some("@x"), some("30000000"), pid).unwrap().watchdog();
        let limit = Some(Duration::from_secs(30));
        assert_eq!(watchdog(None), limit);
        assert_eq!(watchdog(some(std::process::id().to_string())), limit);
        assert_eq!(watchdog(some("1")), None);
        assert_eq!(Notifier::to(None, some("30000000"), None).unwrap().watchdog(), None, "nobody listens");
    }
}
