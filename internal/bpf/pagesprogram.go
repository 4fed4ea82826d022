package bpf

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// pagesName is that of the programs and maps, as bpftool shows it.
const pagesName = "hearth_pages"

// A record as the programs write it, in the byte order of the machine.
const (
	pageCgroup  = 0
	pageInode   = 8
	pageFirst   = 16
	pageCount   = 24
	pageAt      = 32
	pageDevice  = 40 // 4 bytes, and 4 of nothing
	pageRecord  = 48
	maxPages    = 1 << 14 // of one record: 64 MiB
	cgroupDepth = 4       // levels that are looked at, from the process's own cgroup upwards
)

// decodePage reads one record. The kernel may hand over more bytes than were written, never fewer.
func decodePage(b []byte) (PageAccess, error) {
	if len(b) < pageRecord {
		return PageAccess{}, fmt.Errorf("%w: %d bytes", errRecord, len(b))
	}
	a := PageAccess{
		Cgroup: binary.NativeEndian.Uint64(b[pageCgroup:]),
		Device: statDevice(binary.NativeEndian.Uint32(b[pageDevice:])),
		Inode:  binary.NativeEndian.Uint64(b[pageInode:]),
		Page:   binary.NativeEndian.Uint64(b[pageFirst:]),
		Pages:  binary.NativeEndian.Uint64(b[pageCount:]),
		At:     int64(binary.NativeEndian.Uint64(b[pageAt:])),
	}
	if a.Pages == 0 || a.Pages > maxPages || a.Page > 1<<51 {
		return PageAccess{}, fmt.Errorf("%w: %d pages from %d", errRecord, a.Pages, a.Page)
	}
	return a, nil
}

// pageHook is a tracepoint, and how a program for it has mapping, index and count of pages in R7, R8 and R9.
type pageHook struct {
	tracepoint string
	arguments  func(pageLayout) asm.Instructions
}

// pageHooks are in Linux as follows: the first since 3.13, the others since 6.10 and 6.11.
var pageHooks = []pageHook{
	{"mm_filemap_add_to_page_cache", pageLayout.added},
	{"mm_filemap_get_pages", func(pageLayout) asm.Instructions { return between() }},
	{"mm_filemap_map_pages", func(pageLayout) asm.Instructions { return between() }},
	{"mm_filemap_fault", func(pageLayout) asm.Instructions {
		return asm.Instructions{
			asm.LoadMem(asm.R7, asm.R1, 0, asm.DWord), asm.LoadMem(asm.R8, asm.R1, 8, asm.DWord), asm.Mov.Imm(asm.R9, 1),
		}
	}},
}

// pageLayout is where the kernel has what the programs read.
type pageLayout struct {
	mapping, index    int32 // of the page or folio that is added
	folioPages        int32 // its number of pages, 4 bytes, if it is larger than one; or negative
	flags, head       int32 // its flags, and which of them says that it is larger
	host              int32 // address_space
	superblock        int32 // inode
	mode, inode, size int32
	device            int32 // super_block

	cgroups      int32 // task_struct
	subsys, dfl  int32 // css_set
	self         int32 // cgroup
	node         int32
	group, above int32 // cgroup_subsys_state
	id           int32 // kernfs_node

	controllers map[string]int32 // index in css_set.subsys
}

// findPages looks everything up in the running kernel's BTF, and which of the hooks there are.
func findPages() (l pageLayout, hooks []pageHook, err error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return l, nil, err
	}
	page, err := argument(spec, pageHooks[0].tracepoint)
	if err != nil {
		return l, nil, err
	}
	if err := locate(spec, []field{
		{page, []string{"mapping"}, &l.mapping}, {page, []string{"index"}, &l.index}, {page, []string{"flags"}, &l.flags},
		{"address_space", []string{"host"}, &l.host},
		{"inode", []string{"i_sb"}, &l.superblock}, {"inode", []string{"i_mode"}, &l.mode},
		{"inode", []string{"i_ino"}, &l.inode}, {"inode", []string{"i_size"}, &l.size},
		{"super_block", []string{"s_dev"}, &l.device},
		{"task_struct", []string{"cgroups"}, &l.cgroups},
		{"css_set", []string{"subsys"}, &l.subsys}, {"css_set", []string{"dfl_cgrp"}, &l.dfl},
		{"cgroup", []string{"self"}, &l.self}, {"cgroup", []string{"kn"}, &l.node},
		{"cgroup_subsys_state", []string{"cgroup"}, &l.group}, {"cgroup_subsys_state", []string{"parent"}, &l.above},
		{"kernfs_node", []string{"id"}, &l.id},
	}); err != nil {
		return l, nil, err
	}
	l.findLarge(spec)
	l.findControllers(spec)
	for _, h := range pageHooks {
		if _, err := argument(spec, h.tracepoint); err == nil {
			hooks = append(hooks, h)
		}
	}
	return l, hooks, nil
}

// argument is the structure to which the first argument of a tracepoint points.
func argument(spec *btf.Spec, tracepoint string) (string, error) {
	var t *btf.Typedef
	if err := spec.TypeByName("btf_trace_"+tracepoint, &t); err != nil {
		return "", fmt.Errorf("tracepoint %s: %w", tracepoint, err)
	}
	if p, ok := t.Type.(*btf.Pointer); ok {
		if f, ok := p.Target.(*btf.FuncProto); ok && len(f.Params) > 1 { // the first is what the program is called with
			if p, ok := f.Params[1].Type.(*btf.Pointer); ok {
				return p.Target.TypeName(), nil
			}
		}
	}
	return "", fmt.Errorf("tracepoint %s has arguments of another kind", tracepoint)
}

// findLarge looks for the number of pages of a folio, whose place has changed often: it has been in its second page since 5.9,
// first under the name of that. Where it is not found, a folio counts as one page.
func (l *pageLayout) findLarge(spec *btf.Spec) {
	l.folioPages = -1
	var flags *btf.Enum
	var page *btf.Struct
	if spec.TypeByName("pageflags", &flags) != nil || spec.TypeByName("page", &page) != nil {
		return
	}
	for _, v := range flags.Values {
		if v.Name == "PG_head" && v.Value < 31 {
			l.head = 1 << v.Value
		}
	}
	var at int32
	for _, f := range []struct {
		field
		from int32
	}{
		{field{"folio", []string{"_nr_pages"}, &at}, 0},
		{field{"folio", []string{"_folio_nr_pages"}, &at}, 0},
		{field{"page", []string{"compound_nr"}, &at}, int32(page.Size)},
	} {
		if l.head != 0 && locate(spec, []field{f.field}) == nil {
			l.folioPages = at + f.from
			return
		}
	}
}

// findControllers names them as the options of a mount of version 1 do.
func (l *pageLayout) findControllers(spec *btf.Spec) {
	l.controllers = map[string]int32{}
	var ids *btf.Enum
	if spec.TypeByName("cgroup_subsys_id", &ids) != nil {
		return // a kernel that has none of them
	}
	for _, v := range ids.Values {
		name, ok := strings.CutSuffix(v.Name, "_cgrp_id")
		if name == "io" {
			name = "blkio"
		}
		if ok {
			l.controllers[name] = int32(v.Value)
		}
	}
}

// pageMaps are what the programs look things up in, and tell by.
type pageMaps struct{ ring, cgroups, devices, lost, seen *ebpf.Map }

// What the programs have on their stack, from the frame pointer downwards.
const (
	stackRecord  = -pageRecord
	seenKeyBytes = 32
	stackKey     = stackRecord - seenKeyBytes // generation, inode, number of the word of 64 pages, device
	stackMask    = stackKey - 8               // pages of that word
	stackScratch = stackMask - 8
)

// added is the beginning of the program that is called with a page or a folio.
func (l pageLayout) added() asm.Instructions {
	p := asm.Instructions{asm.LoadMem(asm.R7, asm.R1, 0, asm.DWord)}
	p = append(p, follow(asm.R8, asm.R7, l.index)...)
	p = append(p, asm.Mov.Imm(asm.R9, 1))
	if l.folioPages >= 0 {
		p = append(p, follow(asm.R0, asm.R7, l.flags)...)
		p = append(p, asm.And.Imm(asm.R0, l.head), asm.JEq.Imm(asm.R0, 0, "mapping"))
		p = append(p, readKernel(stackScratch, 4, asm.R7, l.folioPages)...)
		p = append(p, asm.LoadMem(asm.R9, asm.RFP, stackScratch, asm.Word),
			asm.JNE.Imm(asm.R9, 0, "mapping"), asm.Mov.Imm(asm.R9, 1))
	}
	mapping := follow(asm.R7, asm.R7, l.mapping)
	mapping[0] = mapping[0].WithSymbol("mapping")
	return append(p, mapping...)
}

// between is the beginning of a program that is called with a mapping, the index of the first page, and of the last.
func between() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R7, asm.R1, 0, asm.DWord),
		asm.LoadMem(asm.R8, asm.R1, 8, asm.DWord),
		asm.LoadMem(asm.R9, asm.R1, 16, asm.DWord),
		asm.Add.Imm(asm.R9, 1),
		asm.JLE.Reg(asm.R9, asm.R8, "exit"),
		asm.Sub.Reg(asm.R9, asm.R8),
	}
}

// follow loads the 8 bytes at off behind the kernel's address in base.
func follow(dst, base asm.Register, off int32) asm.Instructions {
	return append(readKernel(stackScratch, 8, base, off), asm.LoadMem(dst, asm.RFP, stackScratch, asm.DWord))
}

// find looks the key at the place of the stack up; R0 is where its value is, or 0.
func find(m *ebpf.Map, key int32) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapPtr(asm.R1, m.FD()), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key), asm.FnMapLookupElem.Call(),
	}
}

// program is what is attached to a hook. In the order in which most of what happens on a host is ruled out soonest: is the file on
// a watched device and a regular one, is the process in a watched cgroup, were the pages told of before.
func (l pageLayout) program(h pageHook, hierarchy string, m pageMaps) asm.Instructions {
	p := asm.Instructions{asm.Mov.Imm(asm.R0, 0)}
	for off := int16(stackScratch); off < 0; off += 8 {
		p = append(p, asm.StoreMem(asm.RFP, off, asm.R0, asm.DWord))
	}
	p = append(p, h.arguments(l)...)
	p = append(p, l.file(m)...)
	p = append(p, l.process(hierarchy, m)...)
	p = append(p, suppress(m)...)
	p = append(p, tell(m)...)
	return append(p, asm.Mov.Imm(asm.R0, 0).WithSymbol("exit"), asm.Return())
}

// file goes on only with a regular file on a watched device, and has the count of pages end with the file.
func (l pageLayout) file(m pageMaps) asm.Instructions {
	pageShift := int32(bits.TrailingZeros(uint(os.Getpagesize())))
	p := follow(asm.R6, asm.R7, l.host)
	p = append(p, follow(asm.R7, asm.R6, l.superblock)...)
	p = append(p, readKernel(stackRecord+pageDevice, 4, asm.R7, l.device)...)
	p = append(p, find(m.devices, stackRecord+pageDevice)...)
	p = append(p, asm.JEq.Imm(asm.R0, 0, "exit"))
	p = append(p, readKernel(stackScratch, 2, asm.R6, l.mode)...)
	p = append(p, asm.LoadMem(asm.R0, asm.RFP, stackScratch, asm.Half),
		asm.And.Imm(asm.R0, 0xf000), asm.JNE.Imm(asm.R0, 0x8000, "exit")) // S_IFMT, S_IFREG
	p = append(p, readKernel(stackRecord+pageInode, 8, asm.R6, l.inode)...)
	p = append(p, follow(asm.R0, asm.R6, l.size)...)
	return append(p,
		asm.Add.Imm(asm.R0, int32(os.Getpagesize()-1)), asm.RSh.Imm(asm.R0, pageShift),
		asm.JGE.Reg(asm.R8, asm.R0, "exit"),
		asm.Sub.Reg(asm.R0, asm.R8),
		asm.JLE.Reg(asm.R9, asm.R0, "within"),
		asm.Mov.Reg(asm.R9, asm.R0),
		asm.JLE.Imm(asm.R9, maxPages, "bounded").WithSymbol("within"),
		asm.Mov.Imm(asm.R9, maxPages),
		asm.StoreMem(asm.RFP, stackRecord+pageFirst, asm.R8, asm.DWord).WithSymbol("bounded"),
		asm.StoreMem(asm.RFP, stackRecord+pageCount, asm.R9, asm.DWord),
	)
}

// process goes on only in a process of a watched cgroup, or of one below it; R7 is the generation of that.
func (l pageLayout) process(hierarchy string, m pageMaps) asm.Instructions {
	p := asm.Instructions{asm.FnGetCurrentTask.Call(), asm.Mov.Reg(asm.R6, asm.R0)}
	p = append(p, follow(asm.R6, asm.R6, l.cgroups)...)
	if hierarchy == Unified {
		p = append(p, follow(asm.R6, asm.R6, l.dfl)...)
		p = append(p, asm.Add.Imm(asm.R6, l.self))
	} else {
		p = append(p, follow(asm.R6, asm.R6, l.subsys+8*l.controllers[hierarchy])...)
	}
	for level := range cgroupDepth {
		if level > 0 {
			p = append(p, follow(asm.R6, asm.R6, l.above)...)
			p = append(p, asm.JEq.Imm(asm.R6, 0, "exit"))
		}
		p = append(p, follow(asm.R7, asm.R6, l.group)...)
		p = append(p, follow(asm.R7, asm.R7, l.node)...)
		p = append(p, readKernel(stackRecord+pageCgroup, 8, asm.R7, l.id)...)
		p = append(p, find(m.cgroups, stackRecord+pageCgroup)...)
		p = append(p, asm.JNE.Imm(asm.R0, 0, "watched"))
	}
	return append(p,
		asm.Ja.Label("exit"),
		asm.LoadMem(asm.R7, asm.R0, 0, asm.DWord).WithSymbol("watched"))
}

// suppress ends what was told before. Pages over several words of 64 are not remembered: they are told again when they are
// needed again, which is rare, and makes no difference to who listens. Two processors may write one word at once; then pages are
// forgotten, and told again.
func suppress(m pageMaps) asm.Instructions {
	p := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R8), asm.And.Imm(asm.R6, 63), // the first bit
		asm.Mov.Reg(asm.R1, asm.R6), asm.Add.Reg(asm.R1, asm.R9), asm.JGT.Imm(asm.R1, 64, "tell"),
		asm.Mov.Imm(asm.R1, 64), asm.Sub.Reg(asm.R1, asm.R9),
		asm.Mov.Imm(asm.R2, -1), asm.RSh.Reg(asm.R2, asm.R1), asm.LSh.Reg(asm.R2, asm.R6),
		asm.Mov.Reg(asm.R6, asm.R2),
		asm.StoreMem(asm.RFP, stackMask, asm.R6, asm.DWord),
		asm.StoreMem(asm.RFP, stackKey, asm.R7, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, stackRecord+pageInode, asm.DWord), asm.StoreMem(asm.RFP, stackKey+8, asm.R1, asm.DWord),
		asm.RSh.Imm(asm.R8, 6), asm.StoreMem(asm.RFP, stackKey+16, asm.R8, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, stackRecord+pageDevice, asm.Word), asm.StoreMem(asm.RFP, stackKey+24, asm.R1, asm.DWord),
	}
	p = append(p, find(m.seen, stackKey)...)
	return append(p,
		asm.JEq.Imm(asm.R0, 0, "remember"),
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.Mov.Reg(asm.R2, asm.R1), asm.And.Reg(asm.R2, asm.R6), asm.JEq.Reg(asm.R2, asm.R6, "exit"),
		asm.Or.Reg(asm.R1, asm.R6), asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord), asm.Ja.Label("tell"),
		asm.LoadMapPtr(asm.R1, m.seen.FD()).WithSymbol("remember"),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, stackKey),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, stackMask),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
	)
}

// tell writes the record, or counts it as lost.
func tell(m pageMaps) asm.Instructions {
	const availableData, noWakeup, forceWakeup = 0, 1, 2 // BPF_RB_*
	p := asm.Instructions{
		asm.FnKtimeGetNs.Call().WithSymbol("tell"),
		asm.StoreMem(asm.RFP, stackRecord+pageAt, asm.R0, asm.DWord),
		asm.LoadMapPtr(asm.R1, m.ring.FD()), asm.Mov.Imm(asm.R2, availableData), asm.FnRingbufQuery.Call(),
		asm.Mov.Imm(asm.R4, noWakeup),
		asm.JLE.Imm(asm.R0, int32(m.ring.MaxEntries()/4), "write"),
		asm.Mov.Imm(asm.R4, forceWakeup),
		asm.LoadMapPtr(asm.R1, m.ring.FD()).WithSymbol("write"),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, stackRecord),
		asm.Mov.Imm(asm.R3, pageRecord),
		asm.FnRingbufOutput.Call(),
		asm.JEq.Imm(asm.R0, 0, "exit"),
	}
	p = append(p, find(m.lost, stackRecord+pageCgroup)...)
	return append(p,
		asm.JEq.Imm(asm.R0, 0, "exit"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
	)
}
