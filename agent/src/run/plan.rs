//! What a run will do, decided before it does anything: gate, settings, source, point, repository.
//!
//! `--dry-run` prints it. Whatever is refused or missing ends here, with nothing begun.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_proto::words::{Consistency, ErrorClass, GrantValue, Verb};

use super::fence::Fence;
use super::ledger::{HookNote, Note};
use super::messages::Failure;
use crate::freeze::{self, PointError, PointPlan, Protected};
use crate::gate::{self, Needs, Refusal};
use crate::guard::client::Start;
use crate::platform::chain;
use crate::platform::files;
use crate::platform::mounts::Mounts;
use crate::platform::trust::{self, Distrust};
use crate::policy::{
    DestinationSettings, Effort, Floor, Grants, Policies, Policy, ServiceSettings, SourceKind, SourceSettings,
    WorkerSettings,
};
use crate::repository::retention::Rules;
use crate::repository::{self, Input, Location, Mode, UNREADABLE_NAMES_MAX};
use crate::source::{self, Paths};
use crate::storage;

/// A grants file has a line a verb and service.
const GRANTS_BYTES_MAX: u64 = 1024 * 1024;
/// Programs that run a script which is given as an argument.
const INTERPRETERS: &[&str] = &["sh", "bash", "dash", "python", "perl", "ruby", "node"];
/// Mount points that were left out and are named.
const MOUNTS_NAMED_MAX: usize = 20;

/// Everything of the host's settings that a run needs.
#[derive(Clone, Debug)]
pub struct Host {
    /// The agent's state folder.
    pub state_dir: PathBuf,
    /// The settings file that all of this stands in.
    pub settings_file: PathBuf,
    /// How a run gets its guard.
    pub guard: Start,
    /// The grants file.
    pub grants: PathBuf,
    /// Services.
    pub services: Vec<ServiceSettings>,
    /// Destinations.
    pub destinations: Vec<DestinationSettings>,
    /// What no policy can go below.
    pub floor: Floor,
    /// What a backup may cost.
    pub worker: WorkerSettings,
    /// Bounds of destinations behind a network.
    pub storage: storage::Limits,
    /// The bounds that the kernel keeps for workers.
    pub fence: Fence,
    /// Settings of the point in time.
    pub freeze: freeze::Settings,
    /// Settings of repositories.
    pub repository: repository::Settings,
    /// How long a run may take.
    pub run_time_max: Duration,
    /// The server; it names the repository.
    pub server_id: i64,
    /// The company's recovery key.
    pub recovery_recipient: String,
}

impl Host {
    /// Folders that hold what a run itself writes: state, cache and repositories.
    pub fn own_folders(&self) -> Vec<PathBuf> {
        let destinations = self.destinations.iter().filter_map(|d| Some(d.folder()?.to_owned()));
        destinations.chain([self.state_dir.clone()]).collect()
    }

    /// The best consistency that a service can reach here, and why it is no better, as sentences. Looks, and
    /// changes nothing; what it answers is what a run would plan now.
    ///
    /// # Errors
    /// What would make the run fail before anything is begun.
    pub async fn reach(&self, service: &ServiceSettings) -> Result<(Consistency, Vec<String>), Failure> {
        check_programs(service, self)?;
        let is_files = service.source.kind == SourceKind::Files;
        if is_files {
            let missing = |e: source::SourceError| Failure::of(ErrorClass::SourceMissing, &e);
            Paths::look_at(&service.source.paths).map_err(missing)?;
            refuse_symlinks(&service.source.paths)?;
        }
        let point = PointPlan::of(service, "reach", &self.freeze, &self.protected(service)).await;
        let point = point.map_err(|e| point_failure(&e))?;
        let mut reasons = point.reasons().to_vec();
        if is_files {
            mounts_below(&service.source, &point)?;
            if point.is_live() {
                // The one way that is left where a filesystem has no snapshots, if it is open at all.
                let why = freeze::why_not_frozen(service, &self.freeze, &self.protected(service)).await;
                reasons.extend(why.map_err(|e| point_failure(&e))?);
            }
        }
        Ok((point.consistency(service.quiesces()), reasons))
    }

    /// The same, for a runner that was started with this settings file, and with the socket of the guard's
    /// unit where there is one.
    #[must_use]
    pub fn started_with(self, settings_file: &Path, guard_socket: Option<PathBuf>) -> Self {
        let config = settings_file.to_owned();
        let guard = guard_socket.map_or_else(|| Start::Process { config: config.clone() }, Start::Socket);
        Self { settings_file: config, guard, ..self }
    }

    /// The same, with a fence for its workers.
    #[must_use]
    pub fn fenced(self, fence: Fence) -> Self {
        Self { fence, ..self }
    }

    /// What would hurt ourselves if its filesystem were frozen: whatever we write while it is, and whatever
    /// we have to start to thaw it.
    fn protected(&self, service: &ServiceSettings) -> Protected {
        let own = Protected::default()
            .and("the agent's state", &self.state_dir)
            .and("the settings", &self.settings_file)
            .and("the grants", &self.grants);
        let cache = &self.repository.cache_dir;
        let own = if cache.as_os_str().is_empty() { own } else { own.and("the archiver's cache", cache) };
        let own = match std::env::current_exe() {
            Ok(program) => own.and("the agent's own program", program),
            // Replaced by an upgrade meanwhile: what runs lies where nobody has a name for it any more.
            Err(_) => own,
        };
        let folders = self.destinations.iter().filter_map(|d| Some((&d.name, d.folder()?)));
        let own = folders.fold(own, |own, (name, folder)| own.and(format!("the destination `{name}`"), folder));
        programs(service, self).into_iter().fold(own, |own, program| own.and("a program of the run", program))
    }
}

/// What a run will do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The service.
    pub service: ServiceSettings,
    /// The policy in force.
    pub policy: Option<Policy>,
    /// The repository.
    pub location: Location,
    /// The point.
    pub point: PointPlan,
    /// What the archiver reads.
    pub input: Input,
    /// The source's paths as they were when the plan was made.
    pub paths: Option<Paths>,
    /// What will be reached.
    pub consistency: Consistency,
    /// What it may cost.
    pub effort: Effort,
    /// What it was asked for as.
    pub verb: Verb,
    /// What it still needs before it may begin.
    pub needs: Needs,
    /// Whether retention may remove artifacts.
    pub may_prune: bool,
    /// Remarks that do not make the run fail.
    pub warnings: Vec<String>,
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.class, refusal.message)
    }
}

/// Reads the grants. One that is missing grants nothing.
///
/// # Errors
/// When others could have written the file, or it has a mistake: then nothing is granted either, and the
/// error says why.
pub fn read_grants(path: &Path) -> Result<Grants, Failure> {
    match trust::read_text(path, GRANTS_BYTES_MAX) {
        Ok(text) => gate::parse_grants(&text).map_err(|reason| {
            Failure::new(ErrorClass::SettingsInvalid, format!("the grants file {}: {reason}", path.display()))
        }),
        Err(error) if error.is_missing() => Ok(Grants::default()),
        Err(error) => Err(unsafe_permissions("the grants file", &error)),
    }
}

fn unsafe_permissions(what: &str, error: &Distrust) -> Failure {
    Failure::new(ErrorClass::UnsafePermissions, format!("{what} is not believed: {}", chain(error)))
}

/// What the grants let begin.
pub(super) struct Admitted {
    grants: Grants,
    settings: ServiceSettings,
    /// What it does.
    pub(super) verb: Verb,
    /// What it still needs.
    pub(super) needs: Needs,
}

impl Admitted {
    /// Decides by settings and grants alone: nothing is looked at that a run would read, and nothing is made.
    ///
    /// # Errors
    /// The refusal.
    pub(super) fn of(host: &Host, service: &str, verb: &str) -> Result<Self, Failure> {
        let verb: Verb = verb.parse().map_err(|e| Failure::of(ErrorClass::UnknownVerb, &e))?;
        let grants = read_grants(&host.grants)?;
        let settings = host.services.iter().find(|s| s.name == service);
        let Some(settings) = settings.cloned() else {
            let names: Vec<&str> = host.services.iter().map(|s| s.name.as_str()).collect();
            let message = format!("the host's settings name no service `{service}`; they name: {}", names.join(", "));
            return Err(Failure::new(ErrorClass::UnknownService, message));
        };
        let needs = gate::decide(&grants, service, verb)?;
        if verb != Verb::Snapshot {
            return Err(Failure::new(ErrorClass::UnknownVerb, format!("a run cannot do `{verb}`")));
        }
        Ok(Self { grants, settings, verb, needs })
    }
}

impl Plan {
    /// Plans a run of a service.
    ///
    /// # Errors
    /// The refusal, or what is missing.
    pub async fn make(host: &Host, service: &str, verb: &str, run_uid: &str) -> Result<Self, Failure> {
        let Admitted { grants, settings, verb, needs } = Admitted::of(host, service, verb)?;
        let unreadable = |e: files::FileError| {
            let message = format!("{}; put the policy again at the receiver", chain(&e));
            Failure::new(ErrorClass::SettingsInvalid, message)
        };
        let policy = Policies::of(&host.state_dir).load(service).map_err(unreadable)?;
        if let Some(policy) = &policy {
            gate::check_policy(policy, &host.destinations, &host.floor)?;
        }
        check_programs(&settings, host)?;
        let location = location(host, &settings, policy.as_ref())?;
        let paths = match settings.source.kind {
            SourceKind::Files => Some(look_at(host, &settings.source)?),
            SourceKind::Command => None,
        };
        let point = PointPlan::of(&settings, run_uid, &host.freeze, &host.protected(&settings)).await;
        let point = point.map_err(|e| point_failure(&e))?;
        let mut plan = Self {
            consistency: point.consistency(settings.quiesces()),
            effort: host.worker.effort_for(&settings.worker, policy.as_ref().map(|policy| &policy.wishes)),
            point,
            input: Input::Stream { file_name: settings.source.file_name.clone() },
            verb,
            needs,
            may_prune: grants.get(service, Verb::Prune) == GrantValue::Allow,
            warnings: Vec::new(),
            service: settings,
            policy,
            location,
            paths,
        };
        if plan.service.source.kind == SourceKind::Files {
            plan.plan_files(host)?;
        }
        plan.check_consistency()?;
        Ok(plan)
    }

    fn plan_files(&mut self, host: &Host) -> Result<(), Failure> {
        let settings = &self.service.source;
        let below = mounts_below(settings, &self.point)?;
        if settings.one_file_system {
            self.warnings =
                below.iter().map(|mount| format!("{mount} is another filesystem and is left out")).collect();
        }
        self.input = Input::Files {
            paths: settings.paths.clone(),
            exclude: settings.exclude.iter().cloned().chain(own_folders(host, &settings.paths)).collect(),
            one_file_system: settings.one_file_system,
            live: self.point.is_live(),
        };
        Ok(())
    }

    fn check_consistency(&self) -> Result<(), Failure> {
        if self.consistency >= self.service.consistency {
            return Ok(());
        }
        let message = format!(
            "service `{}` asks for consistency `{}`, and its source reaches only `{}` here",
            self.service.name, self.service.consistency, self.consistency
        );
        Err(Failure::new(ErrorClass::PointFailed, message))
    }

    /// What recovery has to know.
    pub fn note(&self) -> Note {
        let hooks = self.service.hooks.iter().map(HookNote::from).collect();
        let intent = self.point.intent();
        Note { service: self.service.name.clone(), location: self.location.clone(), intent, hooks }
    }

    /// The rules of retention, if there are any.
    pub fn retention(&self) -> Option<Rules> {
        let policy = self.policy.as_ref()?;
        let rules = Rules { days: policy.retention_days, count: policy.retention_count };
        (rules.days > 0 || rules.count > 0).then_some(rules)
    }

    /// The plan for people, a line a step.
    pub fn lines(&self) -> Vec<String> {
        let hooks = &self.service.hooks;
        let mut lines = vec![format!("service {}, consistency {}", self.service.name, self.consistency)];
        if self.needs == Needs::Confirmation {
            lines.push("wait until a person confirms it with `hestner-agent confirm RUN`".to_owned());
        }
        lines.extend(hooks.iter().map(|h| format!("pre_freeze of hook {}: {}", h.name, shown(&h.pre_freeze))));
        let spans = self.point.spans_archive();
        let mut releases: Vec<String> =
            hooks.iter().rev().map(|h| format!("post_thaw of hook {}: {}", h.name, shown(&h.post_thaw))).collect();
        lines.extend(self.point.lines());
        if !spans {
            lines.append(&mut releases);
        }
        match &self.input {
            Input::Files { paths, exclude, .. } => {
                let paths: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
                let but = if exclude.is_empty() { String::new() } else { format!(" without {}", exclude.join(", ")) };
                lines.push(format!("archive {}{but}", paths.join(", ")));
            }
            Input::Stream { file_name } => {
                lines.push(format!("archive the output of {} as {file_name}", shown(&self.service.source.argv)))
            }
        }
        lines.push(format!("with {}", self.effort.line()));
        lines.push(format!("into the repository {}, then read back what was stored", self.location.place()));
        lines.extend(self.point.lines_after_archive());
        lines.append(&mut releases);
        if let Some(rules) = self.retention() {
            let verb = match self.may_prune {
                _ if self.location.destination.put_only => "leave to `hestner-agent prune` elsewhere",
                true => "remove",
                false => "keep, because `prune` is not granted,",
            };
            lines.push(format!(
                "{verb} what is neither younger than {} days nor among the newest {}",
                rules.days, rules.count
            ));
        }
        lines.extend(self.warnings.iter().map(|w| format!("warning: {w}")));
        lines
    }
}

/// The failure of a point, with its stable class.
pub(super) fn point_failure(error: &PointError) -> Failure {
    Failure::of(error.class(), error)
}

/// Looks at the source's paths, and at what could not be stored of them as it is.
fn look_at(host: &Host, settings: &SourceSettings) -> Result<Paths, Failure> {
    let missing = |e: source::SourceError| Failure::of(ErrorClass::SourceMissing, &e);
    let paths = Paths::look_at(&settings.paths).map_err(missing)?;
    refuse_symlinks(&settings.paths)?;
    refuse_links(settings, &own_folders(host, &settings.paths))?;
    Ok(paths)
}

fn shown(argv: &[String]) -> String {
    if argv.is_empty() { "nothing".to_owned() } else { argv.join(" ") }
}

fn location(host: &Host, settings: &ServiceSettings, policy: Option<&Policy>) -> Result<Location, Failure> {
    let name = policy.map_or(&settings.destination, |p| &p.destination);
    let Some(destination) = host.destinations.iter().find(|d| d.name == *name) else {
        return Err(Failure::new(ErrorClass::UnknownDestination, format!("the host defines no destination `{name}`")));
    };
    let mode = if policy.is_some_and(|p| !p.encryption_enabled) { Mode::Open } else { Mode::Encrypted };
    Ok(Location::new(destination, mode, host.server_id, &host.state_dir, &host.repository, &host.storage))
}

/// Every program that a run of a service starts as this user, and every script that an interpreter is given.
pub fn programs(settings: &ServiceSettings, host: &Host) -> Vec<PathBuf> {
    let hooks = settings.hooks.iter().flat_map(|h| [&h.pre_freeze, &h.post_thaw, &h.freeze_failed]);
    let commands = hooks.chain([&settings.source.argv]).chain(settings.point.commands());
    let named = commands.flat_map(|argv| argv.first().into_iter().chain(script(argv))).map(PathBuf::from);
    let of_the_point = freeze::programs(settings, &host.freeze);
    named.chain(of_the_point).collect()
}

/// Each of them must be one that nobody else can change.
fn check_programs(settings: &ServiceSettings, host: &Host) -> Result<(), Failure> {
    for program in programs(settings, host) {
        trust::check(&program)
            .map_err(|error| unsafe_permissions(&format!("the program {}", program.display()), &error))?;
    }
    Ok(())
}

/// The script in a command such as `/bin/sh /usr/local/bin/quiesce`.
fn script(argv: &[String]) -> Option<&String> {
    let program = Path::new(argv.first()?).file_name()?.to_str()?;
    let interprets = INTERPRETERS.iter().any(|name| program.starts_with(name));
    argv[1..].iter().find(|arg| !arg.starts_with('-')).filter(|arg| interprets && arg.starts_with('/'))
}

/// See [`source::unstorable_links`].
fn refuse_links(settings: &SourceSettings, own: &[String]) -> Result<(), Failure> {
    let exclude: Vec<String> = settings.exclude.iter().chain(own).cloned().collect();
    let links = source::unstorable_links(&settings.paths, &exclude, settings.one_file_system, UNREADABLE_NAMES_MAX);
    if links.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = links.iter().map(|link| link.display().to_string()).collect();
    let mut failure = Failure::new(
        ErrorClass::SourceUnreadable,
        format!("the target of a symlink is not UTF-8 and would be stored changed: {}", names.join(", ")),
    );
    failure.unreadable = links.len() as u64;
    failure.unreadable_names = names;
    Err(failure)
}

/// The agent's own files change while it works, and the repository would grow into itself.
fn own_folders(host: &Host, paths: &[PathBuf]) -> Vec<String> {
    let own = host.own_folders().into_iter();
    let inside = own.filter(|folder| paths.iter().any(|path| folder.starts_with(path)));
    inside.map(|folder| folder.display().to_string()).collect()
}

/// Mount points below the source that are not excluded by name; a point that would leave them out is refused.
fn mounts_below(settings: &SourceSettings, point: &PointPlan) -> Result<Vec<String>, Failure> {
    let mounts = Mounts::read().map_err(|e| Failure::of(ErrorClass::PointFailed, &e))?;
    let below = settings.paths.iter().flat_map(|path| mounts.below(path)).map(|mount| &mount.point);
    let excluded = |point: &Path| settings.exclude.iter().any(|pattern| point.starts_with(pattern));
    let below = below.filter(|point| !excluded(point)).take(MOUNTS_NAMED_MAX);
    let below: Vec<String> = below.map(|point| point.display().to_string()).collect();
    if point.is_live() || settings.one_file_system || below.is_empty() {
        return Ok(below);
    }
    let names = below.join(", ");
    let message = format!(
        "{names} is mounted below the source, and a snapshot does not cover it: list it under `paths` of another service, exclude it, or set `one_file_system`"
    );
    Err(Failure::new(ErrorClass::PointFailed, message))
}

/// The archiver stores a symlink as a link, so that a source behind one would be green and empty.
fn refuse_symlinks(paths: &[PathBuf]) -> Result<(), Failure> {
    for path in paths {
        let real =
            path.canonicalize().map_err(|e| Failure::of(ErrorClass::SourceMissing, &files::failed("find", path)(e)))?;
        if real != *path {
            let message = format!("the path {} leads over a symlink; write {}", path.display(), real.display());
            return Err(Failure::new(ErrorClass::SettingsInvalid, message));
        }
    }
    Ok(())
}
