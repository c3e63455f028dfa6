//! Numbers: reading them, and what the small programs compute.

use core::fmt;

/// Why a word is not the number that a program wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadNumber<'a> {
    /// What was typed.
    pub word: &'a str,
    /// The smallest number allowed.
    pub min: u64,
    /// The largest number allowed.
    pub max: u64,
}

impl fmt::Display for BadNumber<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { word, min, max } = self;
        write!(f, "'{word}' is not a whole number from {min} to {max}")
    }
}

/// A whole number between `min` and `max`.
pub fn number(word: &str, min: u64, max: u64) -> Result<u64, BadNumber<'_>> {
    let number = word.parse().ok().filter(|number| (min..=max).contains(number));
    number.ok_or(BadNumber { word, min, max })
}

/// The Fibonacci numbers, from 0 on, as far as 128 bits reach.
pub fn fibonacci() -> impl Iterator<Item = u128> {
    let mut pair = (Some(0_u128), Some(1_u128));
    core::iter::from_fn(move || {
        let this = pair.0?;
        pair = (pair.1, pair.1.and_then(|following| this.checked_add(following)));
        Some(this)
    })
}

/// `n!`, if 128 bits can hold it.
pub fn factorial(n: u64) -> Option<u128> {
    (1..=u128::from(n)).try_fold(1_u128, u128::checked_mul)
}

/// Whether `n` is prime, by trial division.
pub fn is_prime(n: u64) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// The greatest common divisor, by Euclid's algorithm. `gcd(0, 0)` is 0.
pub fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_bounds() {
        assert_eq!(number("12", 1, 12), Ok(12));
        for word in ["0", "13", "-1", "", "1x", "99999999999999999999"] {
            assert_eq!(number(word, 1, 12), Err(BadNumber { word, min: 1, max: 12 }));
        }
    }

    #[test]
    fn fibonacci_ends_before_it_overflows() {
        assert!(fibonacci().take(10).eq([0, 1, 1, 2, 3, 5, 8, 13, 21, 34]));
        assert_eq!(fibonacci().nth(186), Some(332_825_110_087_067_562_321_196_029_789_634_457_848));
        let last_two: Vec<_> = fibonacci().skip(185).collect();
        assert!(last_two.len() >= 2 && last_two.is_sorted());
        assert_eq!(last_two[last_two.len() - 2].checked_add(last_two[last_two.len() - 1]), None);
    }

    #[test]
    fn factorial_ends_before_it_overflows() {
        assert_eq!(factorial(0), Some(1));
        assert_eq!(factorial(20), Some(2_432_902_008_176_640_000));
        assert_eq!(factorial(34), Some(295_232_799_039_604_140_847_618_609_643_520_000_000));
        assert_eq!(factorial(35), None);
        assert_eq!(factorial(u64::MAX), None);
    }

    #[test]
    fn primes_and_divisors() {
        let primes: Vec<_> = (0..30).filter(|&n| is_prime(n)).collect();
        assert_eq!(primes, [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]);
        assert_eq!(gcd(48, 36), 12);
        assert_eq!(gcd(17, 5), 1);
        assert_eq!(gcd(0, 7), 7);
        assert_eq!(gcd(0, 0), 0);
    }
}
