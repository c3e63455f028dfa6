//! The criteria: for each stage, a function for each entry of its `rubric.toml`, under the same name and in the same
//! order.

mod stage_01;
mod stage_02;
mod stage_03;
mod stage_04;
mod stage_05;
mod stage_06;
mod stage_07;
mod stage_08;

use anyhow::Result;

use crate::look::Look;

/// A criterion. It is met if it looked at something, all that it wanted was there, and it returns no error.
pub type Criterion = fn(&mut Look) -> Result<()>;

/// The criteria of a stage, 1 to 8.
pub fn of(stage: usize) -> &'static [(&'static str, Criterion)] {
    match stage {
        1 => stage_01::CRITERIA,
        2 => stage_02::CRITERIA,
        3 => stage_03::CRITERIA,
        4 => stage_04::CRITERIA,
        5 => stage_05::CRITERIA,
        6 => stage_06::CRITERIA,
        7 => stage_07::CRITERIA,
        8 => stage_08::CRITERIA,
        _ => &[],
    }
}

/// The criteria of a stage under their functions' names.
macro_rules! criteria {
    ($($name:ident),* $(,)?) => {
        /// In the order of the rubric.
        pub const CRITERIA: &[(&str, $crate::criteria::Criterion)] =
            &[$((stringify!($name), $name)),*];
    };
}
use criteria;
