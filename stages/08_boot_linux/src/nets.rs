//! The network interfaces that `--net` names.

use std::ffi::OsString;

use cli::list::List;
use common::virtio::net::passt::Passt;
use common::virtio::net::tap::Tap;
use common::virtio::net::{self, Mac, Net};

/// A network interface as the command line has it: `tap=NAME` or `user`, and `mac=ADDRESS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    link: Link,
    mac: Option<Mac>,
}

/// Where its frames go.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Link {
    Tap(String),
    User,
}

impl Interface {
    /// Parses the value of `--net`.
    pub fn parse(text: OsString) -> Result<Self, String> {
        let readable = |text: OsString| text.to_string_lossy().into_owned();
        let mut list = List::parse(&text)?;
        let user = list.word(&[("user", ())])?.map(|()| Link::User);
        let tap = list.value("tap", "NAME")?.map(|name| Link::Tap(readable(name)));
        let mac = list.value("mac", "ADDRESS")?.map(|mac| readable(mac).parse()).transpose()?;
        list.end()?;
        match (user, tap) {
            (Some(link), None) | (None, Some(link)) => Ok(Self { link, mac }),
            _ => Err("expected one of tap=NAME and user".to_owned()),
        }
    }

    /// The device, the machine's network interface `number`.
    pub fn open(&self, number: usize) -> Result<Net, net::Error> {
        let mac = |link| self.mac.unwrap_or_else(|| Mac::for_link(link, number));
        Ok(match &self.link {
            Link::Tap(name) => Net::new(Tap::open(name)?, mac(name)),
            Link::User => Net::new(Passt::start()?, mac("user")),
        })
    }
}
