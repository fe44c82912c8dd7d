//! An agent to be: its settings, its grants and where it lives.
//!
//! In: a story (`.allowed(Service::files(..)).as_user(..).started()`). Out: the files on disk, and an
//! [`Agent`] that is written, enrolled or started.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::agent::Agent;
use crate::archiver::Archiver;
use crate::receiver::Receiver;
use crate::restic::{FaultyRestic, STOCK};
use crate::service::Service;
use crate::world::{Company, bin};

/// An agent to be.
#[derive(Clone)]
pub struct AgentBuilder {
    pub(crate) folder: PathBuf,
    receiver: [String; 2],
    pub(crate) token: String,
    pub(crate) fingerprint: String,
    pub(crate) uid: Option<u32>,
    pub(crate) daemon_uid: Option<u32>,
    restic: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) destinations: Vec<(String, PathBuf)>,
    more_destinations: Vec<String>,
    services: Vec<Service>,
    grants: Vec<(String, String, String)>,
    sections: Vec<(String, String)>,
    pub(crate) runner_socket: Option<PathBuf>,
}

impl AgentBuilder {
    /// One with a destination `local` in its own folder, for a receiver and a company.
    pub fn new(folder: &Path, receiver: &Receiver, company: &Company) -> Self {
        Self {
            folder: folder.to_owned(),
            receiver: [receiver.agents().to_string(), receiver.enrolment().to_string()],
            token: receiver.token(company.id, &[]),
            fingerprint: company.fingerprint.clone(),
            uid: None,
            daemon_uid: None,
            restic: PathBuf::from(STOCK),
            state: folder.join("state"),
            destinations: vec![("local".to_owned(), folder.join("repository"))],
            more_destinations: Vec::new(),
            services: Vec::new(),
            grants: Vec::new(),
            sections: Vec::new(),
            runner_socket: None,
        }
    }

    /// Runs daemon and command line as this user, so that files can be unreadable.
    #[must_use]
    pub fn as_user(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// Runs the daemon alone as this user, whose part of the state folder is made for it, as the package does.
    #[must_use]
    pub fn daemon_as_user(mut self, uid: u32) -> Self {
        self.daemon_uid = Some(uid);
        self
    }

    /// Folder of the local socket.
    pub(crate) fn socket_folder(&self) -> PathBuf {
        // The daemon makes its socket in a folder of its own.
        self.daemon_uid.map_or_else(|| self.folder.clone(), |_| self.folder.join("socket"))
    }

    /// A handle to its archiver, from which a run can be held and broken.
    pub fn archiver(&self) -> Archiver {
        Archiver::of(&self.state)
    }

    /// Uses a program in restic's place.
    #[must_use]
    pub fn restic(mut self, faulty: &FaultyRestic) -> Self {
        self.restic = faulty.program();
        self
    }

    /// Puts the state elsewhere.
    #[must_use]
    pub fn state(mut self, path: &Path) -> Self {
        self.state = path.to_owned();
        self
    }

    /// Puts the destination `local` elsewhere, or adds another one.
    #[must_use]
    pub fn destination(mut self, name: &str, path: &Path) -> Self {
        self.destinations.retain(|(other, _)| other != name);
        self.destinations.push((name.to_owned(), path.to_owned()));
        self
    }

    /// Adds a destination of any kind, by its lines but the name.
    #[must_use]
    pub fn destination_of(mut self, name: &str, lines: &str) -> Self {
        self.more_destinations.push(format!("name = {name:?}\n{lines}"));
        self
    }

    /// Adds a service.
    #[must_use]
    pub fn service(mut self, service: Service) -> Self {
        self.services.push(service);
        self
    }

    /// Adds a service and allows snapshots of it.
    #[must_use]
    pub fn allowed(self, service: Service) -> Self {
        let name = service.name.clone();
        self.service(service).grant(&name, "snapshot", "allow")
    }

    /// Writes a grant.
    #[must_use]
    pub fn grant(mut self, service: &str, verb: &str, value: &str) -> Self {
        self.grants.push((service.to_owned(), verb.to_owned(), value.to_owned()));
        self
    }

    /// Adds a line to a section of the settings, such as `("floor", "retention_days = 7")`.
    #[must_use]
    pub fn setting(mut self, section: &str, line: &str) -> Self {
        self.sections.push((section.to_owned(), line.to_owned()));
        self
    }

    /// Has its runners started through a socket, as the units have it.
    #[must_use]
    pub fn runner_socket(mut self, path: &Path) -> Self {
        self.runner_socket = Some(path.to_owned());
        self
    }

    /// Uses this token instead of a fresh one.
    #[must_use]
    pub fn token(mut self, token: &str) -> Self {
        token.clone_into(&mut self.token);
        self
    }

    /// Writes the files only.
    pub fn written(self) -> Agent {
        Agent::written(self)
    }

    /// Writes the files and enrols.
    pub fn enrolled(self) -> Agent {
        let mut agent = self.written();
        agent.enrol_again();
        agent
    }

    /// Writes the files, enrols, starts the daemon and waits until it is connected.
    pub fn started(self) -> Agent {
        let mut agent = self.enrolled();
        agent.start();
        agent
    }

    /// Settings as TOML.
    pub fn settings(&self) -> String {
        let mut text = format!(
            "state_dir = {:?}\nsocket = {:?}\ngrants = {:?}\n",
            self.state,
            self.socket_folder().join("control.sock"),
            self.folder.join("grants.toml"),
        );
        let [address, enrolment] = &self.receiver;
        let mut sections = vec![
            (
                "receiver".to_owned(),
                format!("address = {address:?}\nenrolment_address = {enrolment:?}\nretry_max = \"1s\""),
            ),
            ("repository".to_owned(), format!("restic = {:?}", self.restic)),
        ];
        // Neither the machine's units nor its containers matter to most tests.
        if !self.sections.iter().any(|(name, _)| name == "inventory") {
            sections.push(("inventory".to_owned(), "systemd = false\ndocker_socket = \"/nonexistent\"".to_owned()));
        }
        for (name, line) in &self.sections {
            match sections.iter_mut().find(|(other, _)| other == name) {
                Some((_, lines)) => lines.extend(["\n", line]),
                None => sections.push((name.clone(), line.clone())),
            }
        }
        for (name, lines) in sections {
            let _ = write!(text, "[{name}]\n{lines}\n");
        }
        for (name, path) in &self.destinations {
            let _ = write!(text, "[[destination]]\nname = {name:?}\nkind = \"folder\"\npath = {path:?}\n");
        }
        for lines in &self.more_destinations {
            let _ = write!(text, "[[destination]]\n{lines}\n");
        }
        let destination = &self.destinations[0].0;
        self.services.iter().for_each(|service| text.push_str(&service.toml(destination)));
        text
    }

    pub(crate) fn grants_text(&self) -> String {
        let mut text = String::new();
        let mut services: Vec<&String> = self.grants.iter().map(|(service, ..)| service).collect();
        services.sort();
        services.dedup();
        for service in services {
            let _ = writeln!(text, "[services.{service}]");
            for (_, verb, value) in self.grants.iter().filter(|(name, ..)| name == service) {
                let _ = writeln!(text, "{verb} = {value:?}");
            }
        }
        text
    }

    /// The program; a copy where the user could not reach the one that cargo built.
    pub(crate) fn binary(&self) -> PathBuf {
        let built = bin("hestner-agent");
        if self.uid.or(self.daemon_uid).is_none() {
            return built;
        }
        let copy = self.folder.with_extension("bin").join("hestner-agent");
        std::fs::create_dir_all(copy.parent().expect("a parent")).expect("a folder");
        std::fs::copy(&built, &copy).expect("a copy of the program");
        copy
    }
}
