package store

import (
	"testing"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func FuzzDecodeRecord(f *testing.F) {
	e, err := encodeRecord(Record{Name: "a", Serial: 3, Function: &hearthv1.Function{Name: "a"}, Revision: &hearthv1.Revision{Function: "a", Name: "a-00003"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("a", e.serial, e.function, e.revision)
	f.Add("a", []byte{}, []byte(nil), []byte(nil))
	f.Add("b", e.serial, e.function, e.revision)
	f.Add("a", e.serial, e.function[:3], e.revision)
	f.Fuzz(func(t *testing.T, name string, serial, function, revision []byte) {
		for _, sealed := range []bool{false, true} {
			if sealed { // past the checksum
				serial, function, revision = seal(serial), seal(function), seal(revision)
			}
			r, err := decodeRecord(name, serial, function, revision)
			if err == nil && (r.Name != name || r.Serial < 0 || (r.Function == nil) != (r.Revision == nil) || r.Function != nil && r.Function.GetName() != name) {
				t.Errorf("accepted %v", r)
			}
		}
	})
}

func FuzzDecodeRuntime(f *testing.F) {
	value, image, err := encodeRuntime(Runtime{Name: "a", Generation: 3, Image: "i@sha256:1", Applied: &hearthv1.Runtime{Name: "a", Image: "i"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add("a", value, image)
	f.Add("b", value, image)
	f.Add("a", value[:3], []byte(nil))
	f.Fuzz(func(t *testing.T, name string, value, image []byte) {
		for _, sealed := range []bool{false, true} {
			if sealed { // past the checksum
				value, image = seal(value), seal(image)
			}
			r, err := decodeRuntime(name, value, image)
			if err == nil && (r.Name != name || r.Generation < 1 || r.Applied != nil && (r.Applied.GetName() != name || r.Applied.GetImage() == "")) {
				t.Errorf("accepted %v", r)
			}
		}
	})
}
