//! Whole-number expressions: `+ - * / % ^`, parentheses and signs, with the usual precedence.

use core::fmt;

/// How deep parentheses, signs and powers may nest: the parser calls itself, and its stack is
/// small.
const MAX_DEPTH: u32 = 64;

/// Why an expression has no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// Where in the text, in bytes.
    pub position: usize,
    /// What is wrong there.
    pub kind: ErrorKind,
}

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A number or an opening parenthesis is missing.
    ExpectedNumber,
    /// An operator or the end is missing.
    ExpectedOperator,
    /// A parenthesis was never closed.
    ExpectedClosing,
    /// A number or a result is beyond 64 bits.
    Overflow,
    /// Division by zero, or the remainder of one.
    DivisionByZero,
    /// The exponent is negative.
    NegativeExponent,
    /// More than 64 levels of parentheses, signs and powers.
    TooDeep,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ExpectedNumber => "expected a number or '('",
            Self::ExpectedOperator => "expected an operator (+ - * / % ^)",
            Self::ExpectedClosing => "expected ')'",
            Self::Overflow => "the number does not fit in 64 bits",
            Self::DivisionByZero => "division by zero",
            Self::NegativeExponent => "the exponent is negative",
            Self::TooDeep => "too many levels",
        })
    }
}

/// The value of an expression.
pub fn evaluate(text: &str) -> Result<i64, Error> {
    let mut parser = Parser { text: text.as_bytes(), position: 0, depth: 0 };
    let value = parser.sum()?;
    match parser.peek() {
        None => Ok(value),
        Some(_) => parser.error(ErrorKind::ExpectedOperator),
    }
}

/// Recursive descent: one function a level of precedence, the loosest first.
struct Parser<'a> {
    text: &'a [u8],
    position: usize,
    depth: u32,
}

impl Parser<'_> {
    /// The next byte that is no blank.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.position).is_some_and(u8::is_ascii_whitespace) {
            self.position += 1;
        }
        self.text.get(self.position).copied()
    }

    /// The next byte, if it is one of `operators`, and where it stood.
    fn take(&mut self, operators: &[u8]) -> Option<(u8, usize)> {
        let operator = self.peek().filter(|byte| operators.contains(byte))?;
        self.position += 1;
        Some((operator, self.position - 1))
    }

    fn error<T>(&self, kind: ErrorKind) -> Result<T, Error> {
        Err(Error { position: self.position, kind })
    }

    /// `product (+|- product)*`
    fn sum(&mut self) -> Result<i64, Error> {
        let mut value = self.product()?;
        while let Some((operator, position)) = self.take(b"+-") {
            let right = self.product()?;
            let result =
                if operator == b'+' { value.checked_add(right) } else { value.checked_sub(right) };
            value = result.ok_or(Error { position, kind: ErrorKind::Overflow })?;
        }
        Ok(value)
    }

    /// `signed (*|/|% signed)*`
    fn product(&mut self) -> Result<i64, Error> {
        let mut value = self.signed()?;
        while let Some((operator, position)) = self.take(b"*/%") {
            let right = self.signed()?;
            if right == 0 && operator != b'*' {
                return Err(Error { position, kind: ErrorKind::DivisionByZero });
            }
            let result = match operator {
                b'*' => value.checked_mul(right),
                b'/' => value.checked_div(right),
                // The remainder of MIN % -1 is 0, though its quotient does not fit.
                _ => Some(value.wrapping_rem(right)),
            };
            value = result.ok_or(Error { position, kind: ErrorKind::Overflow })?;
        }
        Ok(value)
    }

    /// `(+|-) signed | power`: a sign binds less than a power, so that -2^2 is -4.
    fn signed(&mut self) -> Result<i64, Error> {
        let Some((sign, position)) = self.take(b"+-") else { return self.power() };
        let value = self.nested(Self::signed)?;
        let result = if sign == b'-' { value.checked_neg() } else { Some(value) };
        result.ok_or(Error { position, kind: ErrorKind::Overflow })
    }

    /// `atom (^ signed)?`: from right to left, so that 2^3^2 is 2^9.
    fn power(&mut self) -> Result<i64, Error> {
        let base = self.atom()?;
        let Some((_, position)) = self.take(b"^") else { return Ok(base) };
        let exponent = self.nested(Self::signed)?;
        let kind = if exponent < 0 { ErrorKind::NegativeExponent } else { ErrorKind::Overflow };
        let result = match (base, u32::try_from(exponent)) {
            (_, Ok(exponent)) => base.checked_pow(exponent),
            (0 | 1, Err(_)) if exponent > 0 => Some(base),
            (-1, Err(_)) if exponent > 0 => Some(if exponent % 2 == 0 { 1 } else { -1 }),
            _ => None,
        };
        result.ok_or(Error { position, kind })
    }

    /// `number | ( sum )`
    fn atom(&mut self) -> Result<i64, Error> {
        if self.take(b"(").is_some() {
            let value = self.nested(Self::sum)?;
            return match self.take(b")") {
                Some(_) => Ok(value),
                None => self.error(ErrorKind::ExpectedClosing),
            };
        }
        if !self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            return self.error(ErrorKind::ExpectedNumber);
        }
        let start = self.position;
        let mut value = 0_i64;
        while let Some(digit) = self.text.get(self.position).filter(|byte| byte.is_ascii_digit()) {
            let next = value.checked_mul(10).and_then(|v| v.checked_add(i64::from(digit - b'0')));
            value = next.ok_or(Error { position: start, kind: ErrorKind::Overflow })?;
            self.position += 1;
        }
        Ok(value)
    }

    fn nested(&mut self, f: impl Fn(&mut Self) -> Result<i64, Error>) -> Result<i64, Error> {
        if self.depth == MAX_DEPTH {
            return self.error(ErrorKind::TooDeep);
        }
        self.depth += 1;
        let value = f(self);
        self.depth -= 1;
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precedence_is_the_usual_one() {
        for (text, expected) in [
            ("1+2*3", 7),
            ("(1+2)*3", 9),
            ("10-4-3", 3),
            ("100/10/5", 2),
            ("17%5*2", 4),
            ("2^3^2", 512),
            ("-2^2", -4),
            ("2^-0", 1),
            ("--3", 3),
            ("2*-3", -6),
            (" 7 ", 7),
            ("-9223372036854775807-1", i64::MIN),
            ("(-9223372036854775807-1)%-1", 0),
            ("(-1)^4294967297", -1),
        ] {
            assert_eq!(evaluate(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn errors_say_what_and_where() {
        use ErrorKind::*;
        for (text, position, kind) in [
            ("", 0, ExpectedNumber),
            ("1+", 2, ExpectedNumber),
            ("1 2", 2, ExpectedOperator),
            ("(1", 2, ExpectedClosing),
            ("1)", 1, ExpectedOperator),
            ("4/0", 1, DivisionByZero),
            ("4%(2-2)", 1, DivisionByZero),
            ("9223372036854775808", 0, Overflow),
            ("9223372036854775807+1", 19, Overflow),
            ("(-9223372036854775807-1)/-1", 24, Overflow),
            ("2^63", 1, Overflow),
            ("2^4294967296", 1, Overflow),
            ("2^-1", 1, NegativeExponent),
            ("x", 0, ExpectedNumber),
        ] {
            assert_eq!(evaluate(text), Err(Error { position, kind }), "{text}");
        }
    }

    #[test]
    fn depth_is_limited() {
        for text in ["(".repeat(10_000), "-".repeat(10_000), "1^".repeat(10_000)] {
            assert_eq!(evaluate(&text).unwrap_err().kind, ErrorKind::TooDeep);
        }
        let nested = format!("{}1{}", "(".repeat(60), ")".repeat(60));
        assert_eq!(evaluate(&nested), Ok(1));
    }
}
