//! Steps at which a debug build can be made to stop, to panic or to block, so that tests can reach every
//! moment of a run. Release builds hold none of this: [`at`] is empty there.
//!
//! What is to happen where stands in a file that only root can write, `STEP ACTION`, read once by [`arm`].
//! Actions: `stop` (SIGSTOP for the whole process, until somebody continues it), `panic`, `stop panic` (when
//! it is continued), and `block PATH` (before it stops, a thread of this process changes a file, wherever
//! that lies).

#[cfg(debug_assertions)]
mod armed {
    use std::path::{Path, PathBuf};
    use std::sync::OnceLock;

    use nix::sys::signal::{Signal, raise};

    #[derive(Debug)]
    enum Action {
        Stop,
        Panic,
        StopThenPanic,
        Block(PathBuf),
    }

    static ARMED: OnceLock<(String, Action)> = OnceLock::new();

    pub(super) fn arm(file: &Path) {
        let Ok(text) = crate::platform::trust::read_text(file, 4096) else { return };
        let words: Vec<&str> = text.split_whitespace().collect();
        let (step, action) = match *words {
            [step, "stop"] => (step, Action::Stop),
            [step, "panic"] => (step, Action::Panic),
            [step, "stop", "panic"] => (step, Action::StopThenPanic),
            [step, "block", path] => (step, Action::Block(path.into())),
            _ => return,
        };
        // The first one counts.
        let _ = ARMED.set((step.to_owned(), action));
    }

    pub(super) fn at(step: &str) {
        let Some((_, action)) = ARMED.get().filter(|(armed, _)| armed == step) else { return };
        match action {
            Action::Stop | Action::StopThenPanic => {}
            Action::Panic => panic!("asked to panic at {step}"),
            Action::Block(path) => block_on(path.clone()),
        }
        // It cannot fail, and a test that waits for the stop would say so.
        let _ = raise(Signal::SIGSTOP);
        if matches!(action, Action::StopThenPanic) {
            panic!("asked to panic at {step}");
        }
    }

    fn block_on(path: PathBuf) {
        let (begun, is_begun) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let _ = begun.send(());
            let _ = std::fs::OpenOptions::new().append(true).create(true).open(path).and_then(|file| file.set_len(1));
        });
        let _ = is_begun.recv();
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// Reads what is to happen; nothing where there is no such file.
pub fn arm(file: &std::path::Path) {
    #[cfg(debug_assertions)]
    armed::arm(file);
    #[cfg(not(debug_assertions))]
    let _ = file;
}

/// A step. Nothing happens unless it was armed in a debug build.
pub fn at(step: &str) {
    #[cfg(debug_assertions)]
    armed::at(step);
    #[cfg(not(debug_assertions))]
    let _ = step;
}
