//! The bounds that the kernel keeps for workers: each is started in a control group of its own, where the runner's unit
//! was handed one to divide.
//!
//! The runner's own unit is divided, and no second unit is made for the worker: that would need D-Bus, which a run does
//! without. Where there is no unit, or a controller is missing, bounds are off, and whoever asks is told so: an
//! address-space limit would count what is only mapped, and bound nothing that matters.

use std::sync::Arc;

use crate::platform::cgroup::{Bounds, Controller, Group, HandedOn};
use crate::platform::chain;
use crate::policy::{Effort, IoClass};

/// What others have at a disk without a word (`io.weight`).
const IO_WEIGHT: u32 = 100;
/// What is left of it for who only wants the disk when nobody else does.
const IO_WEIGHT_IDLE: u32 = 10;

/// What can be bounded here, or why nothing can.
#[derive(Clone, Debug)]
pub struct Fence {
    handed_on: Option<Arc<HandedOn>>,
    why_not: String,
}

impl Default for Fence {
    /// For a runner that is no unit.
    fn default() -> Self {
        Self { handed_on: None, why_not: "runs are no units of systemd here".to_owned() }
    }
}

impl Fence {
    /// For a runner that is a unit. Before it has started anything.
    pub fn of_the_unit() -> Self {
        match HandedOn::to_this_process() {
            Ok(handed_on) => Self { handed_on: Some(Arc::new(handed_on)), why_not: String::new() },
            Err(error) => Self { handed_on: None, why_not: chain(&error) },
        }
    }

    /// What is asked for and not kept, and why, as one sentence. `None`: everything is.
    pub fn off(&self, effort: &Effort) -> Option<String> {
        let asked = [
            ("memory_max", Controller::Memory, effort.memory_bytes_max > 0),
            ("cpu_percent_max", Controller::Cpu, effort.cpu_percent_max > 0),
        ];
        let has = |controller| self.handed_on.as_ref().is_some_and(|handed_on| handed_on.has(controller));
        let missing: Vec<_> = asked.into_iter().filter(|(_, controller, asked)| *asked && !has(*controller)).collect();
        let keys: Vec<String> = missing.iter().map(|(key, ..)| format!("`{key}`")).collect();
        let why = match &self.handed_on {
            None => self.why_not.clone(),
            Some(_) => {
                let names: Vec<&str> = missing.iter().map(|(_, controller, _)| controller.as_str()).collect();
                format!("the run's unit was handed no controller {}", names.join(", "))
            }
        };
        (!missing.is_empty()).then(|| format!("{} is not kept: {why}", keys.join(" and ")))
    }

    /// A group for a worker. `None`: there can be none, or it failed, which is logged: a backup without bounds is better
    /// than none.
    pub(super) fn group(&self, effort: &Effort) -> Option<Group> {
        let bounds = Bounds {
            memory_bytes_max: effort.memory_bytes_max,
            cpu_percent_max: effort.cpu_percent_max,
            io_weight: match effort.io_class {
                IoClass::None => 0,
                IoClass::BestEffort => IO_WEIGHT - 10 * u32::from(effort.io_level.min(7)),
                IoClass::Idle => IO_WEIGHT_IDLE,
            },
        };
        let made = self.handed_on.as_ref()?.group(&bounds);
        made.inspect_err(|error| tracing::warn!(event = "worker_limits_off", reason = chain(error))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::WorkerSettings;

    #[test]
    fn bound_that_nobody_keeps_is_named_and_one_that_nobody_asked_for_is_not() {
        let none = WorkerSettings { memory_max: Default::default(), ..WorkerSettings::default() };
        assert_eq!(Fence::default().off(&none.effort()), None);
        let said = Fence::default().off(&WorkerSettings::default().effort()).unwrap();
        assert_eq!(said, "`memory_max` is not kept: runs are no units of systemd here");
        let both = WorkerSettings { cpu_percent_max: 50, ..WorkerSettings::default() };
        assert!(Fence::default().off(&both.effort()).unwrap().starts_with("`memory_max` and `cpu_percent_max`"));
    }
}
