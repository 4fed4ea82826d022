package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"

	"google.golang.org/protobuf/proto"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const checksumBytes = 4

type encoded struct{ serial, function, revision []byte }

// castagnoli makes the table of the checksum; crc32 keeps it, so that this costs nothing.
func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// seal puts a value's checksum before it.
func seal(value []byte) []byte {
	out := binary.BigEndian.AppendUint32(make([]byte, 0, checksumBytes+len(value)), crc32.Checksum(value, castagnoli()))
	return append(out, value...)
}

func open(sealed []byte) ([]byte, error) {
	if len(sealed) < checksumBytes {
		return nil, errors.New("value is too short")
	}
	value := sealed[checksumBytes:]
	if binary.BigEndian.Uint32(sealed) != crc32.Checksum(value, castagnoli()) {
		return nil, errors.New("value does not have its checksum")
	}
	return value, nil
}

// decodeNumber reads what encodeNumber wrote; nothing is zero.
func decodeNumber(sealed []byte) (int64, error) {
	if sealed == nil {
		return 0, nil
	}
	value, err := open(sealed)
	if err != nil {
		return 0, err
	}
	if len(value) != 8 {
		return 0, fmt.Errorf("number of %d bytes", len(value))
	}
	n := binary.BigEndian.Uint64(value)
	if n >= math.MaxInt64 {
		return 0, fmt.Errorf("number %d is out of range", n)
	}
	return int64(n), nil
}

func encodeRecord(r Record) (encoded, error) {
	function, err := proto.Marshal(r.Function)
	if err != nil {
		return encoded{}, err
	}
	revision, err := proto.Marshal(r.Revision)
	if err != nil {
		return encoded{}, err
	}
	return encoded{serial: encodeNumber(r.Serial), function: seal(function), revision: seal(revision)}, nil
}

// decodeRecord is the inverse of encodeRecord; a deleted Function has neither function nor revision.
func decodeRecord(name string, serial, function, revision []byte) (Record, error) {
	r := Record{Name: name}
	var err error
	if r.Serial, err = decodeNumber(serial); err != nil {
		return Record{}, fmt.Errorf("serial of function %q: %w", name, err)
	}
	if (function == nil) != (revision == nil) {
		return Record{}, fmt.Errorf("function %q is there only in part", name)
	}
	if function == nil {
		return r, nil
	}
	r.Function, r.Revision = &hearthv1.Function{}, &hearthv1.Revision{}
	if err := decodeMessage(function, r.Function); err != nil {
		return Record{}, fmt.Errorf("function %q: %w", name, err)
	}
	if err := decodeMessage(revision, r.Revision); err != nil {
		return Record{}, fmt.Errorf("revision of function %q: %w", name, err)
	}
	if r.Function.GetName() != name || r.Revision.GetFunction() != name {
		return Record{}, fmt.Errorf("function %q holds one of another name", name)
	}
	return r, nil
}

func decodeMessage(sealed []byte, m proto.Message) error {
	value, err := open(sealed)
	if err != nil {
		return err
	}
	return proto.Unmarshal(value, m)
}
