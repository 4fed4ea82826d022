package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// errRecord is for what no program of ours has written.
var errRecord = errors.New("malformed record")

// field asks for the place of a member of a structure of the kernel, in bytes from its beginning.
type field struct {
	in   string
	path []string
	to   *int32
}

// locate looks all places up, and fails with the first that is not there.
func locate(spec *btf.Spec, fields []field) error {
	for _, f := range fields {
		var s *btf.Struct
		if err := spec.TypeByName(f.in, &s); err != nil {
			return fmt.Errorf("struct %s: %w", f.in, err)
		}
		bits, ok := offsetOf(s, f.path)
		if !ok {
			return fmt.Errorf("struct %s has no %v", f.in, f.path)
		}
		*f.to = int32(bits / 8)
	}
	return nil
}

// offsetOf finds a member by the path of names that lead to it, through unnamed structs and unions; in bits.
func offsetOf(t btf.Type, path []string) (uint32, bool) {
	var members []btf.Member
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		members = t.Members
	case *btf.Union:
		members = t.Members
	}
	for _, m := range members {
		rest := path
		if m.Name == path[0] {
			if rest = path[1:]; len(rest) == 0 {
				return uint32(m.Offset), true
			}
		} else if m.Name != "" {
			continue
		}
		if inner, ok := offsetOf(m.Type, rest); ok {
			return uint32(m.Offset) + inner, true
		}
	}
	return 0, false
}

// readKernel copies size bytes from off behind the kernel's address in base to dst of the frame pointer. What is not there is
// read as zero.
func readKernel(dst int32, size int32, base asm.Register, off int32) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, dst),
		asm.Mov.Imm(asm.R2, size),
		asm.Mov.Reg(asm.R3, base), asm.Add.Imm(asm.R3, off),
		asm.FnProbeReadKernel.Call(),
	}
}
