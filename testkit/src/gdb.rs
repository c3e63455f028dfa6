//! A program that waits for gdb, and a scripted gdb.

use std::thread;
use std::time::Instant;

use crate::{Program, Ran, TICK};

/// What stands before the place in the line that says how to attach.
const PLACE: &str = "target remote ";

impl Program {
    /// Runs it with `--gdb`, and gdb with these commands once it waits, until both have ended. The program is the first
    /// of the two.
    #[track_caller]
    pub fn under_gdb(self, commands: &[&str]) -> (Ran, Ran) {
        // A port that is free, so that tests can run side by side.
        self.under_gdb_at("0", commands)
    }

    /// The same with gdb coming in at `address`.
    #[track_caller]
    pub fn under_gdb_at(mut self, address: &str, commands: &[&str]) -> (Ran, Ran) {
        self.command.arg(format!("--gdb={address}"));
        let patience = self.patience;
        let running = self.start();
        let deadline = Instant::now() + patience;
        let place = loop {
            let said = String::from_utf8_lossy(&running.stderr.bytes()).into_owned();
            let place = said
                .split_once(PLACE)
                .and_then(|(_, rest)| Some(rest.split_once('\'')?.0.to_owned()));
            if place.is_some() || running.stderr.ended() || Instant::now() > deadline {
                break place;
            }
            thread::sleep(TICK);
        };
        let Some(place) = place else { running.finish().fail("it did not wait for gdb") };
        let attach = format!("target remote {place}");
        let gdb =
            Self::new("gdb").args(["-nx", "-batch", "-ex", "set pagination off", "-ex", &attach]);
        let gdb = commands.iter().fold(gdb, |gdb, command| gdb.args(["-ex", command]));
        let gdb = gdb.patience(patience).run();
        (running.finish(), gdb)
    }
}
