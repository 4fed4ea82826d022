package layer

// Format and Sniff let black-box tests name the formats.
type Format = format

const (
	Tar  = formatTar
	Gzip = formatGzip
	Zstd = formatZstd
	LZ4  = formatLZ4
)

func Sniff(head []byte) Format { return sniff(head) }
