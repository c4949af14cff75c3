//! Two processes of one cluster may be configured for two roles, if one pushes from the primary's
//! site and the other waits at the spare's.

use crate::config::WantedRole;
use crate::domain::Role;

/// Returns whether the process at the spare's site asks for another role than the one that pushes.
/// `Keep` at the spare's site asks for nothing; at the other one it asks for the role on record.
pub fn wishes_differ(pusher: WantedRole, standby: WantedRole, recorded: Option<Role>) -> bool {
    let of_pusher = match (pusher, recorded) {
        (WantedRole::Keep, Some(Role::Spare)) => WantedRole::Spare,
        (WantedRole::Keep, Some(Role::Primary)) => WantedRole::Primary,
        (asked, _) => asked,
    };
    standby != WantedRole::Keep && standby != of_pusher
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_at_the_spare_s_site_asks_for_nothing() {
        use WantedRole::{Keep, Primary, Spare};
        for recorded in [None, Some(Role::Spare), Some(Role::Primary)] {
            for pusher in [Keep, Primary, Spare] {
                assert!(!wishes_differ(pusher, Keep, recorded));
            }
            for asked in [Primary, Spare] {
                assert!(!wishes_differ(asked, asked, recorded));
            }
            assert!(wishes_differ(Spare, Primary, recorded));
            assert!(wishes_differ(Primary, Spare, recorded));
        }
        assert!(wishes_differ(Keep, Primary, Some(Role::Spare)));
        assert!(!wishes_differ(Keep, Primary, Some(Role::Primary)));
        assert!(!wishes_differ(Keep, Spare, Some(Role::Spare)));
        assert!(wishes_differ(Keep, Spare, Some(Role::Primary)));
    }
}
