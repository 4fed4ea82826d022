package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/layer/erofs"
)

// An image is written without the kernel, which would have judged each extended attribute. What it would have done on a directory
// is done here: see xattrError for what is forgiven.

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// storable gives the attributes that a file system keeps for an inode of this kind, as it keeps them. An access control list
// without a value is one to be taken away.
func storable(list []xattr, kind uint32) ([]xattr, error) {
	var out []xattr
	for _, a := range list {
		value, err := judge(a, kind)
		if errors.Is(err, unix.ENOTSUP) {
			continue
		}
		if err != nil {
			return nil, &refusal{reason: fmt.Sprintf("extended attribute %q", a.name), err: err}
		}
		out = append(out, xattr{a.name, value})
	}
	return out, nil
}

// judge is setxattr(2) for one attribute. What no file system of a node stores is ENOTSUP.
func judge(a xattr, kind uint32) (value string, err error) {
	switch {
	case a.name == "" || len(a.name) > 255:
		return "", unix.ERANGE
	case strings.IndexByte(a.name, 0) >= 0:
		return "", unix.EINVAL
	case len(a.value) > 64<<10:
		return "", unix.E2BIG
	}
	space, rest, _ := strings.Cut(a.name, ".")
	switch {
	case a.name == aclAccess || a.name == aclDefault:
		return judgeACL(a, kind)
	case rest == "", space != "user" && space != "security":
		return "", unix.ENOTSUP
	case space == "user" && kind != unix.S_IFREG && kind != unix.S_IFDIR:
		return "", unix.ENOTSUP // EPERM, which is forgiven there
	case a.name == capability && !validCapability(a.value):
		return "", unix.EINVAL
	}
	return a.value, nil
}

// Of linux/capability.h: the first word of a value is a revision, and perhaps a flag.
const (
	capEffective = 0x1
	capRevision2 = 0x02000000 // struct vfs_cap_data, 20 bytes
	capRevision3 = 0x03000000 // struct vfs_ns_cap_data, 24 bytes
)

func validCapability(value string) bool {
	if len(value) < 4 {
		return false
	}
	switch binary.LittleEndian.Uint32([]byte(value)) &^ capEffective {
	case capRevision2:
		return len(value) == 20
	case capRevision3:
		return len(value) == 24
	}
	return false
}

// Tags of a POSIX access control list, of linux/posix_acl.h.
const (
	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20

	aclVersion    = 2
	aclHeaderSize = 4
	aclEntrySize  = 8
)

// judgeACL checks an access control list as the kernel does. One that says no more than the mode is not kept.
func judgeACL(a xattr, kind uint32) (string, error) {
	switch {
	case kind == unix.S_IFLNK:
		return "", unix.ENOTSUP
	case a.name == aclDefault && kind != unix.S_IFDIR:
		return "", unix.EINVAL
	case len(a.value) == 0:
		return "", nil
	case len(a.value) < aclHeaderSize:
		return "", unix.EINVAL
	case binary.LittleEndian.Uint32([]byte(a.value)) != aclVersion:
		return "", unix.ENOTSUP
	case (len(a.value)-aclHeaderSize)%aclEntrySize != 0:
		return "", unix.EINVAL
	}
	value := []byte(a.value)
	seen := uint16(0)
	for e := value[aclHeaderSize:]; len(e) > 0; e = e[aclEntrySize:] {
		tag, perm, id := binary.LittleEndian.Uint16(e), binary.LittleEndian.Uint16(e[2:]), binary.LittleEndian.Uint32(e[4:])
		if perm > 7 || !follows(tag, seen) {
			return "", unix.EINVAL
		}
		if seen |= tag; tag != aclUser && tag != aclGroup {
			binary.LittleEndian.PutUint32(e[4:], 1<<32-1)
		} else if id == 1<<32-1 {
			return "", unix.EINVAL
		}
	}
	switch {
	case seen == 0:
		return "", nil
	case seen&aclOther == 0:
		return "", unix.EINVAL
	case a.name == aclAccess && seen == aclUserObj|aclGroupObj|aclOther:
		return "", nil
	}
	return string(value), nil
}

// follows says whether a tag may come after those that were seen: each in its order, the owner, its group and others once, and
// others after a mask if single users or groups are named.
func follows(tag, seen uint16) bool {
	switch tag {
	case aclUserObj:
		return seen == 0
	case aclUser:
		return seen != 0 && seen < aclGroupObj
	case aclGroupObj:
		return seen != 0 && seen < aclGroupObj
	case aclGroup:
		return seen&aclGroupObj != 0 && seen < aclMask
	case aclMask:
		return seen&aclGroupObj != 0 && seen < aclMask
	case aclOther:
		return seen&aclGroupObj != 0 && seen < aclOther && (seen&aclMask != 0 || seen&(aclUser|aclGroup) == 0)
	}
	return false
}

// chmodACL changes an access control list as a change of mode does: owner, others, and the mask or else the group.
func chmodACL(value string, mode uint32) string {
	b := []byte(value)
	masked := false
	for e := b[aclHeaderSize:]; len(e) > 0; e = e[aclEntrySize:] {
		masked = masked || binary.LittleEndian.Uint16(e) == aclMask
	}
	for e := b[aclHeaderSize:]; len(e) > 0; e = e[aclEntrySize:] {
		switch tag := binary.LittleEndian.Uint16(e); {
		case tag == aclUserObj:
			binary.LittleEndian.PutUint16(e[2:], uint16(mode>>6&7))
		case tag == aclMask, tag == aclGroupObj && !masked:
			binary.LittleEndian.PutUint16(e[2:], uint16(mode>>3&7))
		case tag == aclOther:
			binary.LittleEndian.PutUint16(e[2:], uint16(mode&7))
		}
	}
	return string(b)
}

// encodeXattrs encodes storable attributes of an inode with this mode.
func encodeXattrs(list []xattr, mode uint32) ([]byte, error) {
	var out []erofs.Xattr
	for _, a := range list {
		if a.name == aclAccess || a.name == aclDefault {
			if a.value == "" {
				continue
			}
			if a.name == aclAccess {
				a.value = chmodACL(a.value, mode)
			}
		}
		out = append(out, erofs.Xattr{Name: a.name, Value: a.value})
	}
	encoded, err := erofs.PutXattrs(out)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoImage, err)
	}
	return encoded, nil
}
