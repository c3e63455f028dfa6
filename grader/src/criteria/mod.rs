//! The criteria: for each stage, a function for each entry of its `rubric.toml`, under the same name and in the same
//! order.

mod stage_01;
mod stage_02;

use anyhow::Result;

use crate::look::Look;

/// A criterion. It is met if it looked at something, all that it wanted was there, and it returns no error.
pub type Criterion = fn(&mut Look) -> Result<()>;

/// The criteria of a stage, 1 to 8.
pub fn of(stage: usize) -> &'static [(&'static str, Criterion)] {
    match stage {
        1 => stage_01::CRITERIA,
        2 => stage_02::CRITERIA,
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
