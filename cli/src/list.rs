//! Device options as QEMU and kvmtool have them: `--disk path=debian.img,ro`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use common::disk::Access;

/// The value of an option that describes a device: elements with commas between them, each of which is
/// `key=value` or a word. A comma that belongs to a value is written twice.
///
/// What describes the device takes out of the list what it knows, and [`end`](Self::end) refuses the rest; so
/// the keys stand in one place.
///
/// ```
/// # use std::ffi::{OsStr, OsString};
/// use cli::list::List;
///
/// let mut list = List::parse(OsStr::new("debian,, 12.img,ro"))?;
/// let path = list.first("path", "FILE")?;
/// let read_only = list.word(&[("rw", false), ("ro", true)])?;
/// list.end()?;
/// assert_eq!((path, read_only), (OsString::from("debian, 12.img"), Some(true)));
/// # Ok::<(), String>(())
/// ```
#[derive(Debug)]
pub struct List {
    /// What nobody has taken yet.
    elements: Vec<Element>,
    /// What was asked for, as one types it.
    known: Vec<String>,
}

#[derive(Debug)]
struct Element {
    key: Vec<u8>,
    value: Option<OsString>,
    is_first: bool,
}

impl List {
    /// Takes the list apart.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        let mut elements = vec![Vec::new()];
        let mut bytes = text.as_bytes().iter().copied().peekable();
        while let Some(byte) = bytes.next() {
            match byte {
                b',' if bytes.next_if_eq(&b',').is_none() => elements.push(Vec::new()),
                byte => elements.last_mut().expect("begins with one").push(byte),
            }
        }
        if elements.len() > 1 && elements.iter().any(Vec::is_empty) {
            return Err(
                "a comma has nothing on one of its sides; one in a name is written twice: \
                        a,,b"
                    .to_owned(),
            );
        }
        let element = |(number, mut bytes): (usize, Vec<u8>)| {
            let equals = bytes.iter().position(|&byte| byte == b'=');
            let value = equals.map(|at| OsString::from_vec(bytes.split_off(at)[1..].to_vec()));
            Element { key: bytes, value, is_first: number == 0 }
        };
        Ok(Self {
            elements: elements.into_iter().enumerate().map(element).collect(),
            known: Vec::new(),
        })
    }

    /// The value of `key`, of which `--help` says `what` it is: it has to be there. A first element without
    /// a key is it, too.
    pub fn first(&mut self, key: &str, what: &str) -> Result<OsString, String> {
        if let Some(first) = self.elements.first_mut()
            && first.is_first
            && first.value.is_none()
        {
            first.value = Some(OsString::from_vec(std::mem::replace(&mut first.key, key.into())));
        }
        match self.value(key, what)? {
            Some(value) => Ok(value),
            None => {
                Err(format!("{key}={what} is missing; a name with = in it needs {key}= before it"))
            }
        }
    }

    /// The value of `key`.
    pub fn value(&mut self, key: &str, what: &str) -> Result<Option<OsString>, String> {
        self.known.push(format!("{key}={what}"));
        let Some(element) = self.take(|element| element.key == key.as_bytes())? else {
            return Ok(None);
        };
        match element.value {
            Some(value) if !value.is_empty() => Ok(Some(value)),
            _ => Err(format!("{key} has no value: {key}={what}")),
        }
    }

    /// What may be done with a disk, if a word says so.
    pub fn access(&mut self) -> Result<Option<Access>, String> {
        self.word(&[
            ("rw", Access::ReadWrite),
            ("ro", Access::ReadOnly),
            ("snapshot", Access::Snapshot),
        ])
    }

    /// What the one of these words stands for that is there.
    pub fn word<T: Copy>(&mut self, words: &[(&str, T)]) -> Result<Option<T>, String> {
        self.known.extend(words.iter().map(|(word, _)| word.to_string()));
        let stands_for = |element: &Element| {
            words.iter().find(|(word, _)| word.as_bytes() == element.key).map(|(_, means)| *means)
        };
        let Some(element) = self.take(|element| stands_for(element).is_some())? else {
            return Ok(None);
        };
        match element.value {
            None => Ok(stands_for(&element)),
            Some(_) => Err(format!("{} takes no value", String::from_utf8_lossy(&element.key))),
        }
    }

    /// Refuses what nobody has taken.
    pub fn end(self) -> Result<(), String> {
        let Some(element) = self.elements.first() else { return Ok(()) };
        let (key, known) = (String::from_utf8_lossy(&element.key), self.known.join(", "));
        Err(format!("{key:?} is unknown, expected {known}; a comma in a name is written twice"))
    }

    /// Takes out the element that is `wanted`, of which there is at most one.
    fn take(&mut self, wanted: impl Fn(&Element) -> bool) -> Result<Option<Element>, String> {
        let Some(at) = self.elements.iter().position(&wanted) else { return Ok(None) };
        let taken = self.elements.remove(at);
        let Some(again) = self.elements.iter().find(|element| wanted(element)) else {
            return Ok(Some(taken));
        };
        let [one, other] = [&taken, again].map(|element| String::from_utf8_lossy(&element.key));
        Err(match one == other {
            true => format!("{one} is given twice"),
            false => format!("{one} and {other} exclude each other"),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn disk(text: &str) -> Result<(OsString, Option<u8>, Option<OsString>), String> {
        let mut list = List::parse(OsStr::new(text))?;
        let path = list.first("path", "FILE")?;
        let mode = list.word(&[("rw", 0), ("ro", 1)])?;
        let serial = list.value("serial", "TEXT")?;
        list.end()?;
        Ok((path, mode, serial))
    }

    #[test]
    fn keys_and_words_come_in_any_order() {
        let whole = Ok(("a.img".into(), Some(1), Some("x=y".into())));
        assert_eq!(disk("a.img,ro,serial=x=y"), whole);
        assert_eq!(disk("serial=x=y,ro,path=a.img"), whole);
        assert_eq!(disk("path=a=b"), Ok(("a=b".into(), None, None)));
        // The first element may look like a word.
        assert_eq!(disk("ro,rw"), Ok(("ro".into(), Some(0), None)));
    }

    #[test]
    fn a_comma_in_a_value_is_written_twice() {
        assert_eq!(disk("a,,b,ro"), Ok(("a,b".into(), Some(1), None)));
        assert_eq!(disk(",,a,,,,b,,,ro"), Ok((",a,,b,".into(), Some(1), None)));
    }

    #[test]
    fn each_mistake_is_named() {
        for (text, why) in [
            ("", "path has no value: path=FILE"),
            ("path=,ro", "path has no value: path=FILE"),
            ("serial=x", "path=FILE is missing"),
            ("a,ro,ro", "ro is given twice"),
            ("a,path=b", "path is given twice"),
            ("a,rw,ro", "rw and ro exclude each other"),
            ("a,ro=1", "ro takes no value"),
            ("a,serial", "serial has no value: serial=TEXT"),
            ("a,", "a comma has nothing on one of its sides"),
            (",ro", "a comma has nothing on one of its sides"),
            (
                "a,readonly",
                "\"readonly\" is unknown, expected path=FILE, rw, ro, serial=TEXT; a comma",
            ),
            ("path=a,b=c", "\"b\" is unknown, expected path=FILE, rw, ro, serial=TEXT; a comma"),
            ("a=b", "path=FILE is missing; a name with = in it needs path= before it"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(why) && !error.contains('\n'), "{text}: {error}");
        }
    }

    proptest! {
        /// Whatever a name consists of, it can be given, and nothing that is given does harm.
        #[test]
        fn every_name_can_be_given(
            name in prop::collection::vec(prop_oneof![Just(b','), Just(b'='), 1..=255_u8], 1..20),
            behind in "[,=a-z]{0,12}",
        ) {
            let doubled = name.iter().flat_map(|&byte| vec![byte; 1 + usize::from(byte == b',')]);
            let mut text: Vec<u8> = b"path=".iter().copied().chain(doubled).collect();
            text.extend(b",ro");
            let mut list = List::parse(OsStr::from_bytes(&text)).unwrap();
            let path = list.first("path", "FILE").unwrap();
            prop_assert_eq!(path.as_bytes(), name);
            prop_assert_eq!(list.word(&[("ro", ())]), Ok(Some(())));
            prop_assert_eq!(list.end(), Ok(()));
            let _ = disk(&behind);
        }
    }
}
