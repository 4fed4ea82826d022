package erofs

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Xattr is an extended attribute with its whole name.
type Xattr struct{ Name, Value string }

// ErrXattrs is what PutXattrs cannot store: a namespace that EROFS does not know, or more than it has room for.
var ErrXattrs = errors.New("extended attributes that EROFS cannot store")

// xattrPrefixes are the beginnings of names that are stored as a number, which is their place here.
var xattrPrefixes = [...]string{1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}

// PutXattrs encodes what follows an inode with these attributes, sorted by name; it is empty if there are none.
func PutXattrs(list []Xattr) ([]byte, error) {
	if len(list) == 0 {
		return nil, nil
	}
	list = slices.SortedFunc(slices.Values(list), func(a, b Xattr) int { return cmp.Compare(a.Name, b.Name) })
	out := make([]byte, xattrHeaderSize)
	for _, x := range list {
		index, rest := xattrIndex(x.Name)
		if index == 0 || len(rest) > 255 || len(x.Value) > maxXattrValueSize {
			return nil, fmt.Errorf("%w: %q of %d bytes", ErrXattrs, x.Name, len(x.Value))
		}
		out = append(out, byte(len(rest)), byte(index))
		out = binary.LittleEndian.AppendUint16(out, uint16(len(x.Value)))
		out = append(append(out, rest...), x.Value...)
		out = append(out, make([]byte, -len(out)&3)...)
	}
	if (len(out)-xattrHeaderSize)/4+1 > maxXattrUnits {
		return nil, fmt.Errorf("%w: %d bytes", ErrXattrs, len(out))
	}
	return out, nil
}

// XattrUnits is what the inode has to say of encoded attributes.
func XattrUnits(encoded []byte) uint16 {
	if len(encoded) == 0 {
		return 0
	}
	return uint16((len(encoded)-xattrHeaderSize)/4 + 1)
}

// GetXattrs reads what PutXattrs wrote.
func GetXattrs(encoded []byte) ([]Xattr, error) {
	if len(encoded) == 0 {
		return nil, nil
	}
	if len(encoded) < xattrHeaderSize {
		return nil, errXattrsBroken
	}
	var list []Xattr
	for b := encoded[xattrHeaderSize:]; len(b) > 0; {
		if len(b) < xattrEntrySize {
			return nil, errXattrsBroken
		}
		nameLen, index, valueLen := int(b[0]), int(b[1]), int(binary.LittleEndian.Uint16(b[2:]))
		end := xattrEntrySize + nameLen + valueLen
		if index >= len(xattrPrefixes) || xattrPrefixes[index] == "" || end > len(b) {
			return nil, errXattrsBroken
		}
		name := xattrPrefixes[index] + string(b[xattrEntrySize:xattrEntrySize+nameLen])
		list = append(list, Xattr{name, string(b[xattrEntrySize+nameLen : end])})
		b = b[min((end+3)&^3, len(b)):]
	}
	return list, nil
}

var errXattrsBroken = errors.New("extended attributes are broken")

// xattrIndex splits a name; index is 0 if it is in no namespace that EROFS has.
func xattrIndex(name string) (index int, rest string) {
	for i, prefix := range xattrPrefixes {
		rest, ok := strings.CutPrefix(name, prefix)
		if prefix == "" || !ok || (rest == "") != !strings.HasSuffix(prefix, ".") {
			continue
		}
		return i, rest
	}
	return 0, ""
}
