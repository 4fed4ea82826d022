package erofs_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-serverless/hearth/layer/erofs"
)

func TestInodeRoundTrip(t *testing.T) {
	want := erofs.Inode{
		Mode: 0o104755, Layout: erofs.Chunked, UID: 1 << 31, GID: 1<<32 - 2, Seconds: 1 << 34, Nanos: 999_999_999,
		Links: 7, Size: 1 << 40, Start: erofs.ChunkFormat(16), XattrUnits: 9,
	}
	b := make([]byte, erofs.InodeSize)
	want.Put(b)
	got := erofs.GetInode(b)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if n := got.Chunks(); n != 1<<24 { // chunks of 64 KiB
		t.Errorf("%d chunks", n)
	}
	if n := got.XattrSize(); n != 44 {
		t.Errorf("%d bytes of attributes", n)
	}
}

func TestXattrsThatDoNotFit(t *testing.T) {
	for name, x := range map[string]erofs.Xattr{
		"no namespace":   {Name: "nonsense.x"},
		"name is prefix": {Name: "user."},
		"not the ACL":    {Name: "system.posix_acl_access.x"},
		"long name":      {Name: "user." + strings.Repeat("x", 256)},
		"long value":     {Name: "user.x", Value: strings.Repeat("x", 1<<16)},
	} {
		if _, err := erofs.PutXattrs([]erofs.Xattr{x}); !errors.Is(err, erofs.ErrXattrs) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	var many []erofs.Xattr
	for _, c := range "abcdefg" {
		many = append(many, erofs.Xattr{Name: "user." + string(c), Value: strings.Repeat("x", 60_000)})
	}
	if _, err := erofs.PutXattrs(many); !errors.Is(err, erofs.ErrXattrs) {
		t.Errorf("too many: error %v", err)
	}
}

// FuzzXattrs reads what a disk may have spoilt, and what it can read it writes again.
func FuzzXattrs(f *testing.F) {
	b, err := erofs.PutXattrs([]erofs.Xattr{{Name: "user.a", Value: "b"}, {Name: "system.posix_acl_access"}, {Name: "security.capability", Value: "12345"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-3])
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := erofs.GetXattrs(b)
		if err != nil {
			return
		}
		again, err := erofs.PutXattrs(list)
		if err != nil {
			return // a name that nobody would write
		}
		if units := erofs.XattrUnits(again); len(again) != (&erofs.Inode{XattrUnits: units}).XattrSize() {
			t.Errorf("%d bytes, %d units", len(again), units)
		}
		if got, err := erofs.GetXattrs(again); err != nil || len(got) != len(list) {
			t.Errorf("%q became %q, error %v", list, got, err)
		}
	})
}
