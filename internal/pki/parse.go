package pki

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

const (
	maxCertificates = 16
	maxFileBytes    = 256 << 10 // of a file, or a value of a Secret

	certificateBlock = "CERTIFICATE"
	keyBlock         = "PRIVATE KEY"
)

// blocks cuts PEM into blocks of one type. Other types and text around blocks are refused: a file that is not what it should be is better
// noticed than used by half.
func blocks(data []byte, kind string) ([][]byte, error) {
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("over %d bytes", maxFileBytes)
	}
	var all [][]byte
	for {
		block, rest := pem.Decode(data)
		switch {
		case block == nil && len(all) == 0:
			return nil, fmt.Errorf("no PEM block of type %s", kind)
		case block == nil:
			return all, nil
		case block.Type != kind:
			return nil, fmt.Errorf("PEM block %.40q where %s is expected", block.Type, kind)
		case len(all) == maxCertificates:
			return nil, fmt.Errorf("over %d PEM blocks", maxCertificates)
		}
		all = append(all, block.Bytes)
		data = rest
	}
}

func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	raw, err := blocks(data, certificateBlock)
	if err != nil {
		return nil, err
	}
	all := make([]*x509.Certificate, len(raw))
	for n, der := range raw {
		if all[n], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", n+1, err)
		}
	}
	return all, nil
}

// parseKeys never says what it read.
func parseKeys(data []byte) ([]*ecdsa.PrivateKey, error) {
	raw, err := blocks(data, keyBlock)
	if err != nil {
		return nil, err
	}
	all := make([]*ecdsa.PrivateKey, len(raw))
	for n, der := range raw {
		key, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			return nil, fmt.Errorf("key %d is no PKCS #8", n+1)
		}
		ours, ok := key.(*ecdsa.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("key %d is no ECDSA key", n+1)
		}
		all[n] = ours
	}
	return all, nil
}

func encodeCertificate(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: certificateBlock, Bytes: c.Raw})
}

func encodeKey(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, errors.New("encode key")
	}
	return pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der}), nil
}
