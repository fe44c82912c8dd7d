//! Docker containers that are held for the point: paused, or stopped and started again.
//!
//! In: names. Out: what was held, to be let go. One that is not running when the plan is made, or right
//! before the window, is left as it is. Before the window the others are claimed in the run's folder, and
//! each is noted when it is held: whoever recovers lets go exactly the claimed ones, and waits for a request
//! that may still be under way inside Docker.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error as DockerError;
use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum as Status};
use bollard::query_parameters::{InspectContainerOptions, StartContainerOptions, StopContainerOptionsBuilder};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::PointError;
use crate::platform::files;
use crate::policy::Hold;

/// How long Docker may take to answer a question, in seconds.
const ANSWER_SECONDS: u64 = 10;
/// What Docker waits for when a container says nothing of its own (docker-stop(1)).
const STOP_SECONDS: u64 = 10;
/// How long a request whose sender died may still be on its way: to pause; to stop, after its time.
const ON_ITS_WAY: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(20);
/// How long one container may take to run again.
pub(super) const LET_GO: Duration = Duration::from_secs(60);
/// How long asking Docker about the containers of a service may take, beside holding them.
pub(super) const ASKED_WITHIN: Duration = Duration::from_secs(20);
/// How long recovery waits for a Docker that is just being started again.
const DOCKER_BACK: Duration = Duration::from_secs(20);
const DOCKER_PAUSE: Duration = Duration::from_millis(200);
/// What a process ends with that SIGKILL ended.
const KILLED: i64 = 137;

/// Containers of a plan, as they are written down before one is touched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Containers {
    /// Docker's socket.
    pub socket: PathBuf,
    /// Those that were running when the plan was made, in the order of the settings.
    pub running: Vec<Container>,
}

/// A container that was running when the plan was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Docker's id; a name may mean another one tomorrow.
    pub id: String,
    /// Its name.
    pub name: String,
    /// How it is held.
    pub hold: Hold,
    /// How long it is given to end, in seconds.
    pub stop_seconds: u64,
}

/// A connection to Docker.
#[derive(Debug)]
pub(super) struct Link {
    docker: Docker,
    socket: PathBuf,
}

impl Link {
    pub(super) async fn open(socket: &Path, seconds: u64) -> Result<Self, PointError> {
        let refused = |error: DockerError| PointError::Docker { socket: socket.to_owned(), reason: error.to_string() };
        let docker = Docker::connect_with_unix(&socket.to_string_lossy(), seconds, bollard::API_DEFAULT_VERSION);
        let negotiated = docker.map_err(refused)?.negotiate_version();
        let answered = tokio::time::timeout(Duration::from_secs(ANSWER_SECONDS), negotiated).await;
        let docker = answered.map_err(|_| no_answer(socket))?.map_err(refused)?;
        Ok(Self { docker, socket: socket.to_owned() })
    }

    /// As [`Self::open`], patiently.
    async fn open_again(socket: &Path) -> Result<Self, PointError> {
        let give_up = Instant::now() + DOCKER_BACK;
        loop {
            match Self::open(socket, LET_GO.as_secs()).await {
                Err(_) if Instant::now() < give_up => tokio::time::sleep(DOCKER_PAUSE).await,
                other => return other,
            }
        }
    }

    /// `None`: there is no such container.
    async fn inspect(&self, name: &str) -> Result<Option<ContainerInspectResponse>, PointError> {
        let asked = self.docker.inspect_container(name, None::<InspectContainerOptions>);
        match tokio::time::timeout(Duration::from_secs(ANSWER_SECONDS), asked).await {
            Ok(Ok(found)) => Ok(Some(found)),
            Ok(Err(DockerError::DockerResponseServerError { status_code: 404, .. })) => Ok(None),
            Ok(Err(error)) => Err(PointError::Docker { socket: self.socket.clone(), reason: error.to_string() }),
            Err(_) => Err(no_answer(&self.socket)),
        }
    }

    /// Where Docker keeps its data.
    pub(super) async fn data_root(&self) -> Option<PathBuf> {
        let info = tokio::time::timeout(Duration::from_secs(ANSWER_SECONDS), self.docker.info()).await;
        info.ok()?.ok()?.docker_root_dir.map(PathBuf::from)
    }
}

fn no_answer(socket: &Path) -> PointError {
    PointError::Docker { socket: socket.to_owned(), reason: "no answer in time".to_owned() }
}

fn status_of(found: &ContainerInspectResponse) -> Option<Status> {
    found.state.as_ref().and_then(|state| state.status)
}

fn started_at(found: ContainerInspectResponse) -> Option<String> {
    found.state?.started_at
}

/// Looks at the containers of a service. What is not running is named in the remarks and left alone.
pub(super) async fn look(names: &[String], hold: Hold, socket: &Path) -> Result<(Containers, Vec<String>), PointError> {
    let mut containers = Containers { socket: socket.to_owned(), running: Vec::new() };
    let mut remarks = Vec::new();
    if names.is_empty() {
        return Ok((containers, remarks));
    }
    let link = Link::open(socket, ANSWER_SECONDS).await?;
    for name in names {
        let refused = |reason: &str| PointError::Container {
            name: name.clone(),
            operation: participle(hold),
            reason: reason.to_owned(),
        };
        let Some(found) = link.inspect(name).await? else {
            return Err(refused("there is no such container; mend `containers` in agent.toml"));
        };
        let removes_itself = found.host_config.as_ref().and_then(|host| host.auto_remove) == Some(true);
        match status_of(&found) {
            Some(Status::RUNNING) if hold == Hold::Stop && removes_itself => {
                return Err(refused("it was started with `--rm` and would be gone for good"));
            }
            Some(Status::RUNNING) => {
                let asked = found.config.as_ref().and_then(|config| config.stop_timeout);
                containers.running.push(Container {
                    id: found.id.clone().unwrap_or_else(|| name.clone()),
                    name: name.clone(),
                    hold,
                    stop_seconds: asked.and_then(|s| u64::try_from(s).ok()).unwrap_or(STOP_SECONDS),
                });
            }
            Some(Status::RESTARTING) => return Err(refused("it is restarting; wait until it runs or stop it")),
            _ => remarks.push(format!("container {name} is not running and stays as it is")),
        }
    }
    Ok((containers, remarks))
}

fn participle(hold: Hold) -> &'static str {
    match hold {
        Hold::Pause => "paused",
        Hold::Stop => "stopped",
    }
}

/// Containers that are about to be held, and what holding them led to.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Open from before the window to after it: asking for one takes as long as pausing.
    link: Option<Link>,
    /// Those that are running and claimed, in order.
    claimed: Vec<Claimed>,
    /// How many of them Docker was asked to hold.
    asked: usize,
    /// How many of them are held.
    held: usize,
    /// Names of those that had to be killed.
    pub(super) killed: Vec<String>,
    /// What people may want to know.
    pub(super) remarks: Vec<String>,
}

/// A container that is about to be held.
#[derive(Debug)]
struct Claimed {
    /// Its place in the list.
    place: usize,
    /// When it was started, as Docker says it: another answer later means that somebody else started it.
    started_at: Option<String>,
}

impl Containers {
    /// Looks at them once more and claims those that run, before the window begins.
    ///
    /// # Errors
    /// When Docker does not answer, or a claim cannot be written.
    pub(super) async fn prepare(&self, folder: &Path, limit: Duration) -> Result<Held, PointError> {
        let mut held = Held::default();
        let link = Link::open(&self.socket, limit.as_secs() + ANSWER_SECONDS).await?;
        for (place, container) in self.running.iter().enumerate() {
            let now = link.inspect(&container.id).await?;
            if now.as_ref().and_then(status_of) == Some(Status::RUNNING) {
                files::create_new(&claim(folder, place), container.name.as_bytes())?;
                held.claimed.push(Claimed { place, started_at: now.and_then(started_at) });
            } else {
                let name = &container.name;
                held.remarks.push(format!("container {name} was not running any more and was left as it was"));
            }
        }
        held.link = Some(link);
        Ok(held)
    }

    /// Holds them one after the other. What was held so far is claimed in the folder, also after an error.
    ///
    /// # Errors
    /// When one cannot be held, or not within `limit`.
    pub(super) async fn hold(&self, folder: &Path, limit: Duration, held: &mut Held) -> Result<(), PointError> {
        let Held { link: Some(link), claimed, asked, held: so_far, killed, .. } = held else { return Ok(()) };
        let holding = async {
            for Claimed { place, .. } in claimed.iter() {
                let container = &self.running[*place];
                *asked += 1;
                let begun = Instant::now();
                container.hold(link, limit).await?;
                note_done(folder, *place)?;
                *so_far += 1;
                // Docker kills only what has not ended by then; another question would cost downtime.
                let was_given_up = container.hold == Hold::Stop && begun.elapsed() >= container.patience(limit);
                if was_given_up && container.exit_code(link).await? == Some(KILLED) {
                    killed.push(container.name.clone());
                }
            }
            Ok(())
        };
        let in_time = tokio::time::timeout(limit, holding).await;
        in_time.unwrap_or(Err(PointError::HeldTooLong { limit, in_doubt: false }))
    }

    /// Lets go whatever was held, the last first: it may need those before it. All are tried; the first error is
    /// returned.
    ///
    /// # Errors
    /// When one cannot be let go, or was not held all the time.
    pub(super) async fn let_go(&self, folder: &Path, held: &Held) -> Result<(), PointError> {
        let Some(link) = held.link.as_ref().filter(|_| held.held == held.asked) else {
            // It broke off while one was asked for: somebody has to look how far that came.
            return self.recover(folder).await;
        };
        let mut first = Ok(());
        for Claimed { place, started_at } in held.claimed[..held.held].iter().rev() {
            let container = &self.running[*place];
            let untouched = container.check_untouched(link, started_at.as_deref()).await;
            first = first.and(container.let_go(link).await).and(untouched);
        }
        first
    }

    /// Lets go, by the claims in the run's folder, whatever a run held that is not there to do it.
    ///
    /// # Errors
    /// When one cannot be let go.
    pub(super) async fn recover(&self, folder: &Path) -> Result<(), PointError> {
        let claimed: Vec<usize> = (0..self.running.len()).filter(|place| claim(folder, *place).exists()).collect();
        if claimed.is_empty() {
            return Ok(());
        }
        let link = Link::open_again(&self.socket).await?;
        let (held, not_yet): (Vec<usize>, Vec<usize>) =
            claimed.into_iter().partition(|place| done(folder, *place).exists());
        let mut first = Ok(());
        for place in held.into_iter().rev() {
            first = first.and(self.running[place].let_go_if_held(&link).await);
        }
        // They are held one after the other, so that one request at most is on its way. Nobody waits for that one
        // but itself.
        if let Some(place) = not_yet.first() {
            let container = &self.running[*place];
            let give_up = Instant::now() + container.time_under_way();
            first = first.and(container.wait_until_held(&link, give_up).await);
            first = first.and(container.let_go_if_held(&link).await);
        }
        first
    }
}

/// Written before a container is touched.
fn claim(folder: &Path, place: usize) -> PathBuf {
    folder.join(format!("container-{place}"))
}

/// Written when it is held.
fn done(folder: &Path, place: usize) -> PathBuf {
    folder.join(format!("container-{place}-held"))
}

/// Without a sync: after a power cut nothing is under way any more, and recovery only looks longer.
fn note_done(folder: &Path, place: usize) -> Result<(), PointError> {
    let path = done(folder, place);
    std::fs::File::create(&path).map(drop).map_err(files::failed("make", &path))?;
    Ok(())
}

impl Container {
    async fn hold(&self, link: &Link, limit: Duration) -> Result<(), PointError> {
        let asked = match self.hold {
            Hold::Pause => link.docker.pause_container(&self.id).await,
            Hold::Stop => {
                let seconds = i32::try_from(self.patience(limit).as_secs()).unwrap_or(i32::MAX);
                let options = StopContainerOptionsBuilder::new().t(seconds);
                link.docker.stop_container(&self.id, Some(options.build())).await
            }
        };
        asked.map_err(|error| self.refused(participle(self.hold), &error))
    }

    /// How long it is given to end by itself.
    fn patience(&self, limit: Duration) -> Duration {
        Duration::from_secs(self.stop_seconds.min(limit.as_secs().max(1)))
    }

    async fn exit_code(&self, link: &Link) -> Result<Option<i64>, PointError> {
        Ok(link.inspect(&self.id).await?.and_then(|found| found.state?.exit_code))
    }

    /// Whether it is held as we hold it; `None`: it is gone.
    async fn is_held(&self, link: &Link) -> Result<Option<bool>, PointError> {
        Ok(link.inspect(&self.id).await?.map(|found| self.is_held_by(&found)))
    }

    fn is_held_by(&self, found: &ContainerInspectResponse) -> bool {
        let status = status_of(found);
        match self.hold {
            Hold::Pause => status == Some(Status::PAUSED),
            Hold::Stop => !matches!(status, Some(Status::RUNNING | Status::RESTARTING | Status::PAUSED)),
        }
    }

    /// Whether it is held as we have held it, and by nobody else's doing. One that is gone may have been started, and
    /// have written, before it was removed.
    async fn check_untouched(&self, link: &Link, since: Option<&str>) -> Result<(), PointError> {
        let found = link.inspect(&self.id).await?;
        if found.is_some_and(|found| self.is_held_by(&found) && started_at(found).as_deref() == since) {
            return Ok(());
        }
        Err(PointError::Touched { name: self.name.clone(), held: participle(self.hold) })
    }

    async fn let_go_if_held(&self, link: &Link) -> Result<(), PointError> {
        match self.is_held(link).await? {
            Some(true) => self.let_go(link).await,
            _ => Ok(()),
        }
    }

    /// How long a request to hold it may be under way after its sender died.
    fn time_under_way(&self) -> Duration {
        let stopping = if self.hold == Hold::Stop { Duration::from_secs(self.stop_seconds) } else { Duration::ZERO };
        ON_ITS_WAY + stopping
    }

    /// The sender of a request may die while Docker is at it: what is not held yet may be in a moment.
    async fn wait_until_held(&self, link: &Link, give_up: Instant) -> Result<(), PointError> {
        while self.is_held(link).await? == Some(false) && Instant::now() < give_up {
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Lets it go. One that is not held, or is gone, needs nothing.
    async fn let_go(&self, link: &Link) -> Result<(), PointError> {
        let docker = &link.docker;
        let asked = async {
            match self.hold {
                Hold::Pause => docker.unpause_container(&self.id).await,
                Hold::Stop => docker.start_container(&self.id, None::<StartContainerOptions>).await,
            }
        };
        let operation = if self.hold == Hold::Pause { "resumed" } else { "started again" };
        match tokio::time::timeout(LET_GO, asked).await {
            Ok(Ok(())) => Ok(()),
            // Somebody else was faster.
            Ok(Err(_)) if self.is_held(link).await? != Some(true) => Ok(()),
            Ok(Err(error)) => Err(self.refused(operation, &error)),
            Err(_) => Err(no_answer(&link.socket)),
        }
    }

    fn refused(&self, operation: &'static str, error: &DockerError) -> PointError {
        PointError::Container { name: self.name.clone(), operation, reason: error.to_string() }
    }
}
