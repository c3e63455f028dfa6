//! The grader: what a stage is worth.
//!
//! A criterion runs one of the eight programs with arguments and files that are random, watches what it and its guest do
//! with KVM, and says what it saw. What a program prints is looked at only beside that, so one that prints what is
//! expected is worth nothing. `README.md` tells how to use it and how to write a criterion.
//!
//! | module | what |
//! |---|---|
//! | `witness` | a program under watch: its ioctls, its guest's exits, memory and registers |
//! | `program` | running one of the submission's programs |
//! | `look` | what a criterion is given, and its paper for what it saw |
//! | `criteria` | the criteria themselves |
//! | `rubric` | what each of them is worth |
//! | `inner` | the criteria of a stage where the stages run: here or in the lab |
//! | `grade` | the command: builds, runs `inner` for each stage, and reports |
//! | `report` | the table and its other forms |
//! | `self_check` | what the grader is worth: honest runs, seeded faults, cheats |
//! | `cheat` | a program that only prints |

pub mod cheat;
pub mod criteria;
pub mod grade;
pub mod inner;
pub mod look;
pub mod program;
pub mod report;
pub mod rubric;
pub mod self_check;
pub mod witness;
